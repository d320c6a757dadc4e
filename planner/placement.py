"""Where each layer of a model sits: the one value that everything else measures, scores and delivers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["solo", "split", "partial", "cpu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Contiguous runs of layers on GPUs, the lowest layers on the CPU.

    llama.cpp leaves the lowest ``cpu_layers`` repeating layers on the CPU and hands the rest to the devices in runs, in
    the order of ``--device`` (``llama_model_base::load_tensors`` in ``src/llama-model.cpp``); the output layer follows the last
    repeating layer, so it lies on the last device that has a share.

    * ``layers``: repeating layers on each GPU, in the rig's order. The output layer is **not** counted.
    * ``order``: the indices of the GPUs that hold something, in the order in which they take layers (lowest first).
    * ``output_gpu``: the GPU of the output layer, ``None`` where it stays on the CPU. When set it is ``order[-1]``.
    * ``cpu_layers``: repeating layers left on the CPU, the lowest ones.
    * ``cpu_experts``: repeating layers whose routed experts stay in RAM although the layer is on a GPU (``-ot``).
    """

    layers: tuple[int, ...]
    order: tuple[int, ...] = ()
    output_gpu: int | None = None
    cpu_layers: int = 0
    cpu_experts: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.layers) or self.cpu_layers < 0:
            raise ValueError(f"a negative number of layers in {self}")
        holders = {gpu for gpu, count in enumerate(self.layers) if count}
        if self.output_gpu is not None:
            holders.add(self.output_gpu)
        if len(set(self.order)) != len(self.order) or set(self.order) != holders:
            raise ValueError(f"order {self.order} does not name each GPU that holds layers once: {sorted(holders)}")
        if self.output_gpu is not None and self.order[-1] != self.output_gpu:
            raise ValueError(f"the output layer is on GPU {self.output_gpu}, which is not the last of {self.order}")

    @property
    def n_layers(self) -> int:
        """Repeating layers of the model, wherever they are."""
        return sum(self.layers) + self.cpu_layers

    @property
    def kind(self) -> Kind:
        """``cpu``: nothing on a GPU; ``partial``: weights in RAM that a GPU could hold; ``solo``, ``split``: all on GPUs."""
        if not self.order:
            return "cpu"
        if self.cpu_layers or self.cpu_experts or self.output_gpu is None:
            return "partial"
        return "solo" if len(self.order) == 1 else "split"

    @property
    def shares(self) -> tuple[int, ...]:
        """Layers of each GPU as Ollama and ``--tensor-split`` count them: the output layer is one more."""
        return tuple(count + (gpu == self.output_gpu) for gpu, count in enumerate(self.layers))

    def ranges(self) -> tuple[tuple[int, range], ...]:
        """``(gpu, repeating layers)`` of each device in ``order``, as contiguous ranges from ``cpu_layers`` up."""
        runs = []
        start = self.cpu_layers
        for gpu in self.order:
            runs.append((gpu, range(start, start + self.layers[gpu])))
            start += self.layers[gpu]
        return tuple(runs)


def solo(gpu: int, *, n_gpus: int, n_layers: int) -> Placement:
    """Every layer and the output layer on ``gpu``."""
    layers = tuple(n_layers if i == gpu else 0 for i in range(n_gpus))
    return Placement(layers=layers, order=(gpu,), output_gpu=gpu)


def on_cpu(*, n_gpus: int, n_layers: int) -> Placement:
    """Nothing on any GPU."""
    return Placement(layers=(0,) * n_gpus, cpu_layers=n_layers)


def contiguous(counts: Sequence[int], n_layers: int, cpu_experts: frozenset[int] = frozenset()) -> Placement:
    """The placement of ``counts`` layers on devices 0, 1, …, the output layer counted on the last that has any."""
    order = tuple(i for i, count in enumerate(counts) if count)
    if not order:
        return on_cpu(n_gpus=len(counts), n_layers=n_layers)
    layers = tuple(count - (i == order[-1]) for i, count in enumerate(counts))
    return Placement(layers=layers, order=order, output_gpu=order[-1], cpu_layers=n_layers - sum(layers), cpu_experts=cpu_experts)


def in_words(placement: Placement, names: Sequence[str]) -> str:
    """``RTX 5090 alone``, ``12 in RAM + 27 on RTX 3090 + 42 on RTX 5090``: lowest layers first, the output layer counted."""
    if placement.kind == "solo":
        return f"{names[placement.order[0]]} alone"
    if placement.kind == "cpu":
        return "all in RAM"
    in_ram = placement.cpu_layers + (placement.output_gpu is None)
    runs = [f"{in_ram} in RAM"] if in_ram else []
    runs += [f"{placement.shares[gpu]} on {names[gpu]}" for gpu in placement.order]
    experts = f", experts of {len(placement.cpu_experts)} layers in RAM" if placement.cpu_experts else ""
    return " + ".join(runs) + experts
