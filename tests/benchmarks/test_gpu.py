"""The GPU benchmark's reading of logs and its models: the parts of ``benchmarks/gpu`` that need no GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks.gpu import bench, measure, models
from benchmarks.gpu.models import HEAD, SCALE, SHAPES, Encoder, profile
from benchmarks.gpu.ollama import make_store
from benchmarks.gpu.report import Load, calibrations, medians, report, rows_of, understood, verdicts
from benchmarks.gpu.serverlog import last_load, placement_of
from planner.memory import estimate_memory
from planner.placement import Placement, solo
from planner.profile import ModelProfile
from planner.settings import LoadSettings
from proxy.models.gguf import is_embedding, read_profile

LOG = (Path(__file__).parents[1] / "data" / "recordings" / "llama-server-two-gpus.log").read_text()
LOADS = LOG.split('msg="starting llama-server"')[1:]
SETTINGS = LoadSettings(num_ctx=4096, batch=512, ubatch=512)
CASES = Path(bench.__file__).parent / "cases.toml"
PCI_IDS = ("0000:00:06.0", "0000:00:07.0")


def on_first(model: ModelProfile) -> Placement:
    return solo(0, n_gpus=2, n_layers=model.n_layers)


PLACED: dict[str, Any] = {"placement": on_first(profile("tiny")), "settings": SETTINGS, "parts": (), "used": ()}


def test_a_split_is_read_off_the_caches() -> None:
    """A real Ollama's log: 36 layers and 29 with the output layer, as its ``--fit`` chose."""
    loaded = last_load(LOADS[0], PCI_IDS)
    assert loaded.order == ("CUDA0", "CUDA1")
    placement = placement_of(loaded, profile("32b"), SETTINGS, ("CUDA0", "CUDA1"))
    assert (placement.layers, placement.output_gpu, placement.cpu_layers) == ((38, 26), 1, 0)


def test_devices_named_in_another_order_keep_their_layers() -> None:
    """``--device CUDA1,CUDA0``: the slow card takes the lowest layers, the output layer is on the fast one."""
    placement = placement_of(last_load(LOADS[3], PCI_IDS), profile("32b"), SETTINGS, ("CUDA0", "CUDA1"))
    assert placement.order == (1, 0)
    assert placement.output_gpu == 0


def test_a_gpu_that_a_process_sees_alone_is_named_by_its_pci_id() -> None:
    """Ollama hides the other GPUs from a load on one: there the second is ``CUDA0`` too."""
    alone = "using device CUDA0 (NVIDIA H200) (0000:00:07.0) - 9 MiB free\nload_tensors: CUDA0 model buffer size = 5.00 MiB\n"
    assert last_load(alone, PCI_IDS).order == ("CUDA1",)
    assert last_load(alone, PCI_IDS).buffers_mib == {"CUDA1": {"model": 5.0}}


def test_a_log_without_whole_layers_is_refused() -> None:
    """Another model's cache is not taken for this one's."""
    with pytest.raises(ValueError, match="layers"):
        placement_of(last_load(LOADS[0], PCI_IDS), profile("moe30"), SETTINGS, ("CUDA0", "CUDA1"))


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("32b", 32.8), ("70b", 70.6), ("moe30", 30.5), ("embed", 0.335)])
def test_the_models_have_as_many_parameters_as_their_namesakes(name: str, billions: float) -> None:
    """Published counts; the vocabulary is Llama 3's, but for BERT's own."""
    assert sum(prod(tensor.shape) for tensor in SHAPES[name].tensors()) / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_report_judges_measured_rows() -> None:
    """What two H200 gave, the second held back: predictions from the solo rows, buffers and NVML's bytes are as promised."""
    rows = json.loads((Path(__file__).parents[1] / "data" / "two_h200.json").read_text())["rows"]
    cases: dict[str, list[Load]] = {"solo-8b": [], "solo-moe30": [], "slow-card": [], "moe": []}
    for row in rows:
        if row["second_gpu_held"] and row["model"] in ("8b", "moe30"):
            solo, words = "none" in row["args"], row["args"].split()
            case = f"solo-{row['model']}" if solo else {"8b": "slow-card", "moe30": "moe"}[row["model"]]
            order = words[words.index("--device") + 1].split(",")
            cases[case].append(understood(row | {"case": case, "way": "sweep", "args": words, "order": order}))
    loads = [load for case in cases.values() for load in case]
    said = "\n".join(verdicts(cases, [], calibrations(loads)))
    assert "decode predicted within 10 % | 8 of 8" in said
    assert "buffers as llama-server prints them, within 2 % or 128 MiB | 20 of 20" in said
    assert "memory in use by NVML, within 2 % or 128 MiB | 20 of 20" in said
    slower = [replace(load, row=load.row | {"way": "auto", "decode": load.row["decode"] * 0.9}) for load in cases["moe"][:1]]
    said = "\n".join(verdicts(cases | {"moe": [*cases["moe"], *slower]}, [], calibrations(loads)))
    assert "| automatic ≥ 0.97 × the best of the sweep | moe 0." in said
    assert "**no**" in said


def test_the_model_of_embeddings_is_one_to_its_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file says what the planner computes with, and that it embeds; it has a token for each passage's word."""
    monkeypatch.setitem(SHAPES, "embed", Encoder(2, 64, 128, 4))
    models.write(tmp_path / "embed.gguf", "embed")
    read, known = read_profile(tmp_path / "embed.gguf"), profile("embed")
    assert is_embedding(read.metadata)
    assert sorted(read.tensors, key=str) == sorted(known.tensors, key=str)
    assert estimate_memory(read, SETTINGS, on_first(read)) == estimate_memory(known, SETTINGS, on_first(known))
    writer = Mock()
    SHAPES["embed"].add_tokenizer(writer)
    (tokens,), (types,) = writer.add_token_list.call_args.args, writer.add_token_types.call_args.args
    assert len(tokens) == len(types) == len(set(tokens)) == models.WORDPIECES
    assert tokens[100:104] == ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert {f"▁{word}" for word in bench.passage().split()} < set(tokens)


def test_a_model_of_embeddings_is_a_load_of_its_own(tmp_path: Path) -> None:
    """What Ollama 0.32.15 started for one, on the second GPU: its layers are where its weights are, and its bytes as printed."""
    command = "llama-server -c 512 -np 1 --flash-attn auto --embedding -b 512 -ub 512 --split-mode none --main-gpu 0"
    embedding = {
        "model": "embed",
        "prefill": 8000.0,
        "load_s": 1.0,
        "order": ["CUDA1"],
        "buffers_mib": {"CUDA1": {"model": 577.23, "compute": 12.51}, "CPU": {"compute": 6.51}},
        "commands": [f'msg="starting llama-server" cmd="{command}"'],
    }
    chat = {"case": "two", "way": "auto", "model": "32b", "loaded": [{"name": "32b:latest"}], "embedding": embedding}
    (tmp_path / "rows").write_text(
        "".join(json.dumps(chat | {"loaded": loaded}) + "\n" for loaded in ([], [{"name": "embed:latest"}]))
    )
    unloaded, _, row, rest = rows_of(tmp_path / "rows")
    assert (unloaded["way"], row["way"], rest["way"]) == ("auto: embedding, then unloaded", "auto: embedding", "auto")
    load = understood(row)
    assert load.layers == "0 + 25"
    assert load.parts == (pytest.approx((589.74, 589.74), rel=0.01),)


def test_what_differs_from_load_to_load_is_loaded_again(tmp_path: Path) -> None:
    """Four times in turn, those that are done already not counted; the report takes the median of all runs."""
    case = {"model": "tiny", "num_ctx": 512, "sweep": ["0,5", "5,0"], "again": ["auto", "sweep 0,5"]}
    run = SimpleNamespace(hold="0", cards=0.0, ways=["auto", "sweep"], out=tmp_path / "rows")
    rig = bench.Bench(args=run, work=tmp_path, models=tmp_path, server=tmp_path, cases={"fits": case}, done=[])
    again = ["auto", "sweep 0,5"] * 3
    assert [todo for _, todo in bench.steps(rig) if todo] == [["auto", "sweep 0,5", "sweep 5,0", *again]]
    rig.done.extend([("fits", "auto"), ("fits", "auto"), ("fits", "sweep 0,5"), ("another", "auto")])
    assert [todo for _, todo in bench.steps(rig) if todo] == [
        ["sweep 5,0", "sweep 0,5", "auto", "sweep 0,5", "auto", "sweep 0,5"]
    ]
    loads = [
        Load(row={"way": "auto", "decode_runs": runs, "prefill_runs": runs, "decode": 0, "prefill": 0, "load_s": 1.0}, **PLACED)
        for runs in ([1.0, 2.0, 30.0], [4.0, 5.0, 60.0])
    ]
    (one,) = medians(loads)
    assert (one.row["decode"], one.row["loads"]) == (4.5, 2)


def test_what_is_missing_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ollama, one GPU of two, no compiler, too small a disk, and a model that nobody has."""
    monkeypatch.setattr(bench, "pci_ids", lambda: ("0000:01:00.0",))
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    ollama = tmp_path / "ollama/bin/ollama"
    args = SimpleNamespace(ollama=ollama, models=tmp_path, work=tmp_path, device="CUDA", hold="auto", cards=0.0, as_is=False)
    assert [problem.split(" ")[:3] for problem in bench.obstacles(args, ["8b", "mine"])] == [
        ["there", "is", "no"],
        ["NVIDIA's", "driver", "shows"],
        [str(tmp_path), "lacks", "mine,"],
        ["the", "models", "take"],
    ]
    (tmp_path / "ollama/lib/ollama").mkdir(parents=True)
    for file in (ollama, tmp_path / "ollama/lib/ollama/llama-server", tmp_path / "8b.gguf"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    monkeypatch.setattr(bench, "pci_ids", lambda: PCI_IDS)
    assert ["nvcc" in problem for problem in bench.obstacles(args, ["8b"])] == [True]
    args.as_is, args.hold = True, "0"
    assert list(bench.obstacles(args, ["8b"])) == []


def test_a_report_of_nothing_keeps_no_promise_and_one_of_nonsense_says_where(tmp_path: Path) -> None:
    """A cut line is named."""
    (rows := tmp_path / "rows").write_text("")
    assert "| yes |" not in report(rows, CASES)
    rows.write_text('{"case": "fits", "way": "auto", "model": "8b"}\n{"case": "fi')
    with pytest.raises(ValueError, match="rows:2 is no row"):
        report(rows, CASES)


def test_gpus_must_have_been_at_rest_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's memory is freed, then Ollama looks at the GPU once more: what it holds meanwhile is not taken for rest."""
    readings = iter([20_000.0, 500.0, 1024.0, 500.0, 500.0, 500.0, 500.0, 501.0, 502.0])
    now = iter(range(1000))
    monkeypatch.setattr(measure, "used_mib", lambda: [next(readings)])
    monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    assert measure.settled_mib([490.0], still_s=5.0) == [501.0]
    assert measure.settled_mib([490.0]) == [502.0]
    monkeypatch.setattr(measure, "used_mib", lambda: [1024.0])
    assert measure.settled_mib([490.0], patience_s=3.0) == [1024.0]


@pytest.mark.parametrize("name", ["8b", "32b", "70b"])
def test_what_cuda_keeps_in_f16_stays_below_its_end(name: str) -> None:
    """The rows of a matrix are alike, so its outputs are, and so are the normed inputs: sums are those of a row's weights.

    A row's weights are -8 to 7 times ``SCALE``, evenly, so half a ``SCALE`` each on the average. Four deviations are added."""
    width = SHAPES[name].width
    output = SCALE * (width / 2 + 4 * sqrt(21.25 * width))
    assert output**2 * HEAD < 65504 / 2  # a score: query times key
    assert output**2 * 32 < 65504 / 2  # a block of the FFN: gate times up


def test_a_store_is_made_of_links(tmp_path: Path) -> None:
    """Ollama's layout, nothing copied: the manifest names blobs that exist."""
    model = tmp_path / "a.gguf"
    model.write_bytes(b"GGUF")
    make_store(tmp_path / "store", {"a": model})
    manifest = json.loads((tmp_path / "store/manifests/registry.ollama.ai/library/a/latest").read_text())
    blobs = [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    files = [tmp_path / "store/blobs" / digest.replace(":", "-") for digest in blobs]
    assert [file.stat().st_size for file in files] == [manifest["config"]["size"], 4]
    assert files[1].is_symlink()
