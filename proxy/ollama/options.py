"""Delivery of a plan by the options of a request: what is put in, what is taken out, and what a client's wish is.

From Ollama 0.30 on, ``main_gpu`` puts a model on one GPU; a split over several cannot be asked of a stock Ollama, only of
forks that know ``tensor_split``. Up to 0.24, ``num_gpu`` is the only lever. Everything here is a function of its arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from planner.autofit import FIT_MARGIN_BYTES
from planner.hardware import Rig
from planner.placement import Placement
from planner.plan import Plan
from planner.request import Candidate, Era
from planner.stock import main_gpu_of
from planner.units import MIB

FIT_SLACK_BYTES = 256 * MIB
"""Distance from the margin of ``--fit`` at which the layers are said all the same: for the memory model's own error."""

PLACEMENT_OPTIONS = ("num_gpu", "main_gpu", "tensor_split")
"""The options that say where a model goes."""

FIRST_LLAMA_SERVER = (0, 30)
"""First Ollama that starts upstream's ``llama-server``."""

MAIN_GPU = frozenset({"main_gpu"})
"""What is taken out of a client's options: it can only be 0 there, or the request would not be planned."""

Options = Mapping[str, int | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """What a request's options get, and the text of ``X-Lopsided-Plan``.

    ``X-Lopsided-Plan`` is ``placement *("; " note)``. The placement is what was asked of Ollama: ``stock``,
    ``solo DEVICE``, ``split DEVICE=LAYERS,…``, ``partial DEVICE=LAYERS,…``, or ``cpu``; a device is its library and its number
    there (``CUDA0``), layers count the output layer. The notes: by which rule (``auto``, ``boost 1.75``), or why stock.
    """

    text: str
    options: Options = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    by_launcher: bool = False
    """The launcher places the model, as the plan's ``chosen`` says or as it is then."""

    @property
    def places(self) -> bool:
        """Whether a placement of lopsided's goes out, one way or the other."""
        return bool(self.options) or self.by_launcher


def stock(reason: str, *, without: frozenset[str] = frozenset()) -> Delivery:
    """Nothing is put in, and ``reason`` says why."""
    return Delivery(text=header_text(f"stock; {reason}"), without=without)


def with_context(delivery: Delivery, num_ctx: int) -> Delivery:
    """``delivery`` that also sets the context, for requests that leave it open."""
    text = header_text(f"{delivery.text}; context {num_ctx}")
    return replace(delivery, text=text, options={**delivery.options, "num_ctx": num_ctx})


def era_of(version: str) -> Era:
    """The era of an Ollama ``version``; a development build (``0.0.0``) counts as new."""
    numbers = version.split("-")[0].split("+")[0].removeprefix("v").split(".")
    try:
        major, minor = int(numbers[0]), int(numbers[1])
    except (ValueError, IndexError):
        return "llama-server"
    return "runner" if (0, 0) < (major, minor) < FIRST_LLAMA_SERVER else "llama-server"


def own_wish(options: Mapping[str, object], defaults: Mapping[str, object]) -> str | None:
    """The placement option that the client or the model sets, in words, or ``None`` where the planner is free.

    A client's ``main_gpu: 0`` counts as unset (a harmless default until 0.30), as does ``num_gpu: -1``, Ollama's own word for
    "you choose".
    """
    unset = {"main_gpu": (0,), "num_gpu": (-1,)}
    for name in PLACEMENT_OPTIONS:
        if options.get(name) is not None and options[name] not in unset.get(name, ()):
            return f"the request sets {name}"
    for name in PLACEMENT_OPTIONS:
        if defaults.get(name) is not None and (name, defaults[name]) != ("num_gpu", -1):
            return f"the model sets {name}"
    return None


def deliver(plan: Plan, era: Era, *, tensor_split: bool, explicit: bool = False) -> Delivery:
    """How ``plan`` is told to an Ollama of ``era``; a client's ``main_gpu: 0`` goes out in any case.

    ``plan.chosen_by_options`` is what a stock Ollama can be told. Where nothing of that is better than stock, a split still
    goes out as ``tensor_split``, for forks that know it, where that can say it (``_tensor_split_says``).
    ``explicit``: stock's own placement is said too, if it is one GPU that ``main_gpu`` can name.
    """
    how = "auto" if plan.request.boost is None else f"boost {plan.request.boost:g}"
    told = plan.chosen_by_options
    if era == "runner":
        return _deliver_layers(plan, how)
    main_gpu = main_gpu_of(plan.rig, told.placement.order[0]) if len(told.placement.order) == 1 else None
    if (explicit and main_gpu is not None) or not plan.unchanged_by_options:
        options: dict[str, int | str] = {} if main_gpu is None else {"main_gpu": main_gpu}
        if told.placement.kind != "solo" or not keeps_fit_margin(told, plan.rig):
            options["num_gpu"] = sum(told.placement.shares)
        return _delivery(f"{placement_text(told.placement, plan.rig)}; {how}", options)
    if plan.unchanged:
        return stock(f"{how}; {plan.reverted or 'nothing is faster'}", without=MAIN_GPU)
    label = placement_text(plan.chosen.placement, plan.rig)
    if tensor_split and _tensor_split_says(plan.chosen.placement):
        shares = ",".join(str(share) for share in plan.chosen.placement.shares)
        return _delivery(f"{label}; {how}; by tensor_split, which stock Ollama ignores", {"tensor_split": shares})
    return stock(f"{how}; {label} needs the launcher", without=MAIN_GPU)


def _tensor_split_says(placement: Placement) -> bool:
    """Whether shares by index mean ``placement``: all on GPUs, in ascending order; so the output layer is on the last."""
    return placement.kind == "split" and list(placement.order) == sorted(placement.order)


def deliver_by_launcher(plan: Plan, *, spread: bool, tensor_split: bool) -> Delivery:
    """How ``plan`` goes out where the launcher places each load: without options.

    Where Ollama does not spread (``spread``), it hides the other GPUs from a load that it puts on one: such a plan still goes
    out as ``main_gpu``.
    """
    if not spread and plan.chosen.placement.kind == "solo":
        return deliver(plan, "llama-server", tensor_split=tensor_split)
    how = "auto" if plan.request.boost is None else f"boost {plan.request.boost:g}"
    how += f"; {plan.reverted}" if plan.reverted else ""
    text = f"{placement_text(plan.chosen.placement, plan.rig)}; {how}; by the launcher"
    return Delivery(text=header_text(text), without=MAIN_GPU, by_launcher=True)


def _deliver_layers(plan: Plan, how: str) -> Delivery:
    """Up to 0.24: the number of layers on GPUs, where that is more than Ollama would take by itself.

    Fewer, on better cards, can't be asked for: Ollama would take that many from its own layout, which only gets slower.
    """
    layers = sum(plan.chosen.placement.shares)
    if plan.unchanged:
        return stock(f"{how}; {plan.reverted or 'nothing is faster'}", without=MAIN_GPU)
    label = placement_text(plan.chosen.placement, plan.rig)
    if layers <= sum(plan.stock.placement.shares):
        return stock(f"{how}; {label} can't be asked of this Ollama", without=MAIN_GPU)
    return _delivery(f"{label}; {how}; by num_gpu alone", {"num_gpu": layers})


def _delivery(text: str, options: Options) -> Delivery:
    return Delivery(text=header_text(text), options=options, without=MAIN_GPU)


def keeps_fit_margin(solo: Candidate, rig: Rig) -> bool:
    """Whether ``solo``, on one GPU alone, leaves it so much room that llama.cpp's ``--fit`` has nothing to change."""
    (gpu,) = solo.placement.order
    left_bytes = rig.gpus[gpu].free_bytes - solo.memory.devices[gpu].total_bytes
    return left_bytes >= FIT_MARGIN_BYTES + FIT_SLACK_BYTES


def library_index(rig: Rig, gpu: int) -> int:
    """The number of the rig's GPU ``gpu`` in its library."""
    library = rig.gpus[gpu].library
    return sum(other.library == library for other in rig.gpus[:gpu])


def device_names(rig: Rig) -> tuple[str, ...]:
    """What llama.cpp calls each of the rig's GPUs: ``CUDA0``, ``CUDA1``, …"""
    return tuple(f"{gpu.library}{library_index(rig, index)}" for index, gpu in enumerate(rig.gpus))


def placement_text(placement: Placement, rig: Rig) -> str:
    """A placement as ``X-Lopsided-Plan`` names it."""
    names = device_names(rig)
    if placement.kind == "solo":
        return f"solo {names[placement.order[0]]}"
    if placement.kind == "cpu":
        return "cpu"
    shares = ",".join(f"{names[gpu]}={share}" for gpu, share in enumerate(placement.shares) if share)
    return f"{placement.kind} {shares}"


def header_text(text: str) -> str:
    """``text`` as a header may hold it: one line of printable ASCII, at most 256 characters."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:256]
