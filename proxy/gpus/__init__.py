"""Sources of a rig: what GPUs there are, how fast they are, and what each has free now.

``nvml`` asks the driver, ``static`` reads a profile or ``--gpu`` arguments, ``specs`` is a table of cards for the latter.
``order`` brings what NVML found into Ollama's device order; ``host`` reads the machine's RAM,
``reader`` whatever source there is, without holding anybody up.
"""

from typing import Protocol

from planner.hardware import Rig


class GpuSource(Protocol):
    """Where a rig comes from."""

    def rig(self) -> Rig:
        """The machine as it stands now, its GPUs in Ollama's device order; memory is read anew at each call.

        Raises ``GpuError`` where there is no GPU or it cannot be asked; the message says what to do.
        """
        ...
