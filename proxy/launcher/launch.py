"""Delivery by launcher: what ``docker/llama-server`` posts when Ollama loads a model, and what it is answered.

The request is ``POST /lopsided/launch``, ``text/plain``, a line a thing, each ending in ``\\n``::

    CUDA_VISIBLE_DEVICES=0,1                    facts of its environment, those that are set
    DEVICES=Available%20devices:%0A%20%20…      only when it was asked for: what --list-devices prints
                                                (an empty line)
    --model                                     Ollama's arguments, one a line
    /root/.ollama/models/blobs/sha256-…

In a value ``%``, space, tab, ``\\n`` and ``\\r`` are written ``%25``, ``%20``, ``%09``, ``%0A`` and ``%0D``; all other bytes
stand as they are. The answer: **200**, ``text/plain`` with ``Content-Length``, arguments to append, one a line, flag and value in
turn; **204**, leave Ollama's arguments as they are; **409** with ``devices needed``, ask again with the list. Anything else the
launcher takes for a fault. Everything here is a function of its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from urllib.parse import unquote_to_bytes

from planner.hardware import Gpu, Host, Rig
from planner.placement import Placement
from planner.plan import Plan
from planner.request import PlanRequest
from planner.settings import LoadSettings
from planner.stock import automatic_batch
from proxy.config.settings import GO_BOOLEANS
from proxy.errors import ModelError
from proxy.gpus.listed import ListedDevice, parse_listing, rig_of
from proxy.gpus.order import DeviceOrder, in_ollama_order, visible_gpus
from proxy.gpus.static import UNNAMED
from proxy.ollama.options import device_names, keeps_fit_margin

BODY_LIMIT_BYTES = 64 * 1024
"""Largest request that is read; Ollama's arguments are about 500 bytes, a list of devices 100 for each."""

DEVICES_NEEDED = "devices needed"

WISHES = (
    *("LLAMA_ARG_DEVICE", "LLAMA_ARG_SPLIT_MODE", "LLAMA_ARG_TENSOR_SPLIT", "LLAMA_ARG_MAIN_GPU", "LLAMA_ARG_N_GPU_LAYERS"),
    *("LLAMA_ARG_FIT", "LLAMA_ARG_OVERRIDE_TENSOR", "LLAMA_ARG_CPU_MOE", "LLAMA_ARG_N_CPU_MOE"),
)
"""Variables of Ollama's environment by which a user places models by hand (llama.cpp's ``common/arg.cpp``)."""

CUDA = "CUDA"
"""The library whose devices ``CUDA_VISIBLE_DEVICES`` is about."""

OWN_BATCHES = (256, 512, 1024, 2048)
"""Batches that Ollama chooses itself where nobody sets ``num_batch`` (``automaticGenerationBatch`` in ``server/sched.go``)."""

_VALUES = {
    **dict.fromkeys(("-m", "--model"), "model"),
    **dict.fromkeys(("-mm", "--mmproj"), "projector"),
    **dict.fromkeys(("-c", "--ctx-size"), "context"),
    **dict.fromkeys(("-np", "--parallel"), "parallel"),
    **dict.fromkeys(("-b", "--batch-size"), "batch"),
    **dict.fromkeys(("-ub", "--ubatch-size"), "ubatch"),
    **dict.fromkeys(("-ctk", "--cache-type-k"), "kv_type_k"),
    **dict.fromkeys(("-ctv", "--cache-type-v"), "kv_type_v"),
    **dict.fromkeys(("-fa", "--flash-attn"), "flash_attention"),
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers"), "gpu_layers"),
    **dict.fromkeys(("-sm", "--split-mode"), "split_mode"),
    **dict.fromkeys(("-mg", "--main-gpu"), "main_gpu"),
}
"""Flags with a value, of which the last one counts (``startLlamaServer`` in Ollama's ``llm/llama_server.go``)."""

_EMBEDDING = frozenset({"--embedding", "--embeddings"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRequest:
    """A load as Ollama has asked llama-server for it.

    ``flash_attention`` in ``settings`` is true for ``auto`` too. ``gpu_layers`` is ``-ngl``: Ollama passes it where a client or
    the model sets ``num_gpu``. ``main_gpu`` is set with ``--split-mode none``: one GPU, of those visible. ``devices`` is ``None``
    where the list was not asked for.
    """

    model_path: str
    settings: LoadSettings
    projector_path: str | None = None
    adapter_paths: tuple[str, ...] = ()
    gpu_layers: int | None = None
    main_gpu: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[ListedDevice, ...] | None = None

    @property
    def blob(self) -> str:
        """The model file's name, ``sha256-…``: what launches of one model have in common."""
        return PurePosixPath(self.model_path).name

    @property
    def spread(self) -> bool:
        """Ollama spreads every model over all GPUs (``OLLAMA_SCHED_SPREAD``)."""
        value = self.environment.get("OLLAMA_SCHED_SPREAD", "").strip(" \"'")
        return GO_BOOLEANS.get(value, bool(value))

    @property
    def wish(self) -> str | None:
        """Whose placement this is, in words, where a client, the model or the server's environment chose one."""
        if self.gpu_layers is not None:
            return "the request or the model sets num_gpu"
        return next((f"Ollama's environment sets {name}" for name in WISHES if name in self.environment), None)


def parse_launch(body: bytes) -> LaunchRequest:
    """The request of a body. Raises ``ModelError`` where it is no load that could be planned."""
    facts, _, arguments = body.partition(b"\n\n") if not body.startswith(b"\n") else (b"", b"", body[1:])
    environment: dict[str, str] = {}
    for line in facts.split(b"\n"):
        name, equals, value = line.partition(b"=")
        if equals:
            environment[os.fsdecode(name)] = _decoded(value)
    listing = environment.pop("DEVICES", None)
    request = parse_arguments([_decoded(line) for line in arguments.removesuffix(b"\n").split(b"\n")])
    return replace(request, environment=environment, devices=None if listing is None else parse_listing(listing))


def parse_arguments(arguments: Sequence[str]) -> LaunchRequest:
    """The load that llama-server's ``arguments`` ask for. Raises ``ModelError`` where there is no model or no context."""
    values: dict[str, str] = {}
    adapters: list[str] = []
    rest = iter(arguments)
    for flag in rest:
        if flag in _VALUES:
            values[_VALUES[flag]] = next(rest, "")
        elif flag == "--lora":
            adapters += next(rest, "").split(",")
    if not values.get("model"):
        raise ModelError("these arguments load no model: there is no --model")
    parallel = _integer(values, "parallel", 1)
    batch = _integer(values, "batch", 2048)
    try:
        settings = LoadSettings(
            num_ctx=_integer(values, "context", 0) // max(parallel, 1),
            parallel=parallel,
            batch=batch,
            ubatch=min(_integer(values, "ubatch", 512), batch),
            kv_type_k=values.get("kv_type_k", "f16"),
            kv_type_v=values.get("kv_type_v", "f16"),
            flash_attention=values.get("flash_attention", "auto") not in ("off", "0", "false", "disabled"),
            outputs=None if _EMBEDDING & set(arguments) else parallel,
        )
    except ValueError as error:
        raise ModelError(f"{PurePosixPath(values['model']).name}: {error}") from error
    single = values.get("split_mode") == "none"
    return LaunchRequest(
        model_path=values["model"],
        settings=settings,
        projector_path=values.get("projector"),
        adapter_paths=tuple(adapters),
        gpu_layers=_integer(values, "gpu_layers", 0) if "gpu_layers" in values else None,
        main_gpu=_integer(values, "main_gpu", 0) if single else None,
    )


def visible_devices(request: LaunchRequest, rig: Rig | None, order: DeviceOrder | None = None) -> dict[str, Gpu] | None:
    """The GPUs that llama-server will see, by the names that ``--device`` has for them, in its order.

    ``rig`` has all GPUs that lopsided knows, in Ollama's device order, ``None`` where it knows none; ``order`` is what lopsided's
    own environment says of that order. ``None`` is answered where only ``--list-devices`` can tell: no rig, nothing said of what
    is visible, an entry that means no card of the rig, or GPUs of another library or machine. What a profile says of those
    (``library = "RPC"``) is found by their names, and so is what it says of cards whose numbers or UUIDs it does not have.
    """
    known: dict[str, Gpu] = {}
    visible = request.environment.get("CUDA_VISIBLE_DEVICES")
    cuda = [gpu for gpu in rig.gpus if gpu.library == CUDA] if rig else []
    if cuda and visible is not None:
        by_pci = request.environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        gpus = _visible(cuda, visible, order or DeviceOrder(), by_pci=by_pci)
        known = {f"CUDA{number}": gpu for number, gpu in enumerate(gpus)}
    others = {name: gpu for name, gpu in zip(device_names(rig), rig.gpus, strict=True) if gpu.library != CUDA} if rig else {}
    if request.devices is not None:
        if not known:  # a profile need not know the UUIDs by which Ollama shows the cards
            known = {gpu.uuid: gpu for gpu in cuda if gpu.uuid.startswith(UNNAMED)}
        listed = rig_of(request.devices, known={**known, **others}, host=Host())
        return {device.name: gpu for device, gpu in zip(request.devices, listed.gpus, strict=True)}
    if others or "LLAMA_ARG_RPC" in request.environment:
        return None
    return known or None


def _visible(cuda: Sequence[Gpu], visible: str, order: DeviceOrder, *, by_pci: bool) -> Sequence[Gpu]:
    """What Ollama's ``visible`` means, of ``cuda``, which stand in Ollama's order; nothing where an entry means none of them.

    Where the user hides or turns cards by their numbers, Ollama goes on to write those numbers, while the rig has the visible
    cards alone, in the order in which they are named.
    """
    entries = [entry.strip() for entry in visible.split(",")]
    own = [entry.strip() for entry in (order.visible or "").split(",")]
    if any(entry.isdecimal() for entry in own):
        if order.names or order.by_pci != by_pci or len(own) != len(cuda):
            return ()
        named = dict(zip(own, cuda, strict=True))
        return [named[entry] for entry in entries] if named.keys() >= set(entries) else ()
    found = in_ollama_order(cuda, DeviceOrder(by_pci=True, visible=visible)) if by_pci else visible_gpus(cuda, visible)
    counted = entries == [str(number) for number in range(len(entries))]  # none hidden: a profile may leave out the last ones
    return found if counted or len(found) == len(entries) else ()


def plan_request(request: LaunchRequest, base: PlanRequest) -> PlanRequest:
    """What to plan for a launch: ``base`` (boost, margin, calibration, …) with all that Ollama's arguments say.

    ``spread`` is off: stock without it is what a plan is compared with. A batch that Ollama's own rule never takes, or not for so
    short a context, is a client's; an embedding model's goes by no placement, and a longer text than it is refused.
    """
    settings = request.settings
    embedding = settings.outputs is None
    own = settings.batch in OWN_BATCHES and settings.batch <= automatic_batch(settings, 0, (), 0)  # the most by this context
    return replace(
        base,
        num_ctx=settings.num_ctx,
        num_batch=base.num_batch if own and not embedding else settings.batch,
        parallel=settings.parallel,
        kv_type_k=settings.kv_type_k,
        kv_type_v=settings.kv_type_v,
        flash_attention=settings.flash_attention,
        embedding=embedding,
        spread=False,
        era="llama-server",
    )


def render(
    placement: Placement, names: Sequence[str], *, settings: LoadSettings, asked: LoadSettings, exact: bool = True
) -> tuple[str, ...] | None:
    """``placement`` as llama-server's arguments; ``names[i]`` is what ``--device`` calls GPU ``i``.

    ``settings`` are the plan's, ``asked`` Ollama's. ``exact`` false leaves a placement on one GPU to the care of llama.cpp's
    ``--fit``, which changes nothing while its margin is free. ``None`` where llama-server can't be told: nothing on a GPU, or
    the output layer alone on the CPU (``-ngl`` counts the output layer first: ``load_tensors`` in ``src/llama-model.cpp``).
    """
    order = placement.order
    if placement.output_gpu is None:
        return None
    arguments = ["--device", ",".join(names[gpu] for gpu in order)]
    if len(order) > 1:
        shares = placement.shares
        arguments += ["--split-mode", "layer", "--tensor-split", ",".join(str(shares[gpu]) for gpu in order)]
    else:
        arguments += ["--split-mode", "none", "--main-gpu", "0"]
    if exact or placement.kind != "solo":
        arguments += ["-ngl", str(sum(placement.shares)), "--fit", "off"]
    arguments += _experts(placement)
    if settings.batch != asked.batch:
        arguments += ["-b", str(settings.batch)]
    if settings.ubatch != asked.ubatch:
        arguments += ["-ub", str(settings.ubatch)]
    return tuple(arguments)


def plan_arguments(plan: Plan, names: Sequence[str], asked: LoadSettings) -> tuple[str, ...] | None:
    """What delivers ``plan``, made for the visible devices ``names``; ``None`` where Ollama's own arguments do the same.

    ``asked`` are the settings that Ollama's arguments have.
    """
    chosen = plan.chosen
    exact = True
    if chosen.placement.kind == "solo":
        exact = not keeps_fit_margin(chosen, plan.rig)
        if len(names) == 1 and not exact and (chosen.settings.batch, chosen.settings.ubatch) == (asked.batch, asked.ubatch):
            return None
    return render(chosen.placement, names, settings=chosen.settings, asked=asked, exact=exact)


def answer(arguments: Sequence[str] | None) -> tuple[int, bytes]:
    """Status and body for arguments to append, ``None`` for Ollama's own."""
    return (200, "".join(f"{argument}\n" for argument in arguments).encode()) if arguments else (204, b"")


def ask_for_devices() -> tuple[int, bytes]:
    """Status and body that make the launcher list the devices and ask again."""
    return 409, f"{DEVICES_NEEDED}\n".encode()


def _experts(placement: Placement) -> list[str]:
    """Routed experts in RAM. Of layers in RAM they are there anyway, so those count as named where that makes it shorter."""
    named = sorted(placement.cpu_experts - frozenset(range(placement.cpu_layers)))
    if not named:
        return []
    if named == list(range(placement.cpu_layers, named[-1] + 1)):
        return ["--n-cpu-moe", str(named[-1] + 1)]
    layers = "|".join(str(layer) for layer in named)
    return ["-ot", rf"blk\.({layers})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"]


def _integer(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ModelError(f"these arguments can't be planned: {name} is {text!r}, not a number") from None


def _decoded(value: bytes) -> str:
    return os.fsdecode(unquote_to_bytes(value))
