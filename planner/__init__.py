"""Places the layers of a language model on unequal GPUs. Pure: no I/O, no clock, no environment, no logging.

``make_plan(profile, rig, request)`` is the whole of it: what a model is, what a machine has, and what is asked for go in, a
``Plan`` comes out, with what stock Ollama would do beside it and the reasons. From the bottom up:

* ``hardware``, ``profile``, ``settings``, ``placement``: the vocabulary. A ``Rig`` has its GPUs in Ollama's order, a
  ``ModelProfile`` the bytes of each layer, ``LoadSettings`` context, batch, cache types, a ``Placement`` the GPU of each layer.
* ``memory``: the bytes that a placement takes on each device (its parts: ``cache``, ``compute``, ``schedule``, ``exchange``,
  ``programs``, ``graph`` of ``operations``, ``attention``, ``recurrent``, ``feedforward`` and ``traits``, ``tape``,
  ``allocator``, ``families``, ``quantization``); ``sizes`` answers the same for a search, in microseconds.
* ``speed``: the tokens per second of a placement, from the cards' data or learned rates (``Calibration``); ``observation`` and
  ``calibration`` learn them from answers.
* ``fit`` and ``autofit``: how Ollama's two eras split layers; ``stock``: what stock Ollama does with a request.
* ``power``, ``costs``, ``balance``, ``contiguous``, ``layout``: the boost algorithm.
* ``request``, ``search`` (with ``cuts``), ``choice``, ``plan``, ``reasons``: the question, the candidates, which one wins, the
  answer, and why. ``frontier``: the context that each kind of placement has room for; ``runnersup``: the next best.
* ``recipes``: what quantizing makes of a model.
"""

from planner.hardware import Gpu, Host, Rig
from planner.memory import DeviceMemory, MemoryEstimate, estimate_memory
from planner.placement import Placement
from planner.plan import Plan, make_plan
from planner.profile import ModelProfile, build_profile
from planner.request import Candidate, PlanRequest
from planner.settings import LoadSettings
from planner.speed import Calibration

__all__ = [
    "Calibration",
    "Candidate",
    "DeviceMemory",
    "Gpu",
    "Host",
    "LoadSettings",
    "MemoryEstimate",
    "ModelProfile",
    "Placement",
    "Plan",
    "PlanRequest",
    "Rig",
    "build_profile",
    "estimate_memory",
    "make_plan",
]
