"""`lopsided estimate`: splits as llama.cpp counts them, and the JSON that other programs read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from planner.placement import Placement, solo
from proxy.estimate import estimate_command, placement_of

LLAMA = Path(__file__).parents[1] / "data" / "gguf" / "llama3.3-70b-q4km.gguf"
QWEN = LLAMA.with_name("qwen3-30b-a3b-q4km.gguf")


def test_the_split_counts_the_output_layer_last() -> None:
    """Layers in order from the first offloaded one; those that are not counted, the lowest, stay on the CPU."""
    assert placement_of(80, (43, 38)) == Placement(layers=(43, 37), order=(0, 1), output_gpu=1)
    assert placement_of(80, (0, 20, 0)) == Placement(layers=(0, 19, 0), order=(1,), output_gpu=1, cpu_layers=61)
    assert placement_of(80, ()) == solo(0, n_gpus=1, n_layers=80)
    assert placement_of(80, (0, 0)) == Placement(layers=(0, 0), cpu_layers=80)


def test_too_many_layers_are_refused() -> None:
    """A split that counts more layers than there are says how many there are; exit code 2."""
    result = CliRunner().invoke(estimate_command, [str(LLAMA), "--split", "50,50"])
    assert result.exit_code == 2
    assert "100 layers" in result.output
    assert "80" in result.output


@pytest.mark.parametrize(("name", "hint"), [("qwen2.5:32b", True), ("model.gguf", False), ("/", False)])
def test_a_models_name_is_told_where_names_are_taken(name: str, hint: bool) -> None:
    """`lopsided plan` takes them; exit code 2."""
    result = CliRunner().invoke(estimate_command, [name])
    assert result.exit_code == 2
    assert (f"lopsided plan {name}" in result.output) is hint


@pytest.mark.parametrize("split", ["a,b", "-1,82"])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    """Words and negative numbers are no layer counts; exit code 2."""
    assert CliRunner().invoke(estimate_command, [str(LLAMA), "--split", split]).exit_code == 2


def test_json_holds_every_part_and_the_total() -> None:
    """MiB of each part on each device and on the host, as llama-fit-params prints them for this load (b10488)."""
    arguments = ["--ctx", "4096", "--split", "41,40", "--runtime-mib", "500", "--json"]
    result = CliRunner().invoke(estimate_command, [str(LLAMA), *arguments])
    assert result.exit_code == 0, result.output
    value = json.loads(result.output)
    keys = {"weights_mib", "kv_mib", "compute_mib", "runtime_mib", "total_mib"}
    assert set(value) == {"devices", "host", "upper_bound"}
    assert [set(device) for device in value["devices"]] == [keys | {"name"}] * 2
    assert set(value["host"]) == keys
    first, second = value["devices"]
    assert [int(first["weights_mib"]), first["kv_mib"], first["runtime_mib"]] == [21273, 656, 500]
    assert [int(second["weights_mib"]), second["kv_mib"]] == [21058, 624]
    for part in (first, second, value["host"]):
        assert part["total_mib"] == pytest.approx(sum(part[key] for key in keys - {"total_mib"}), abs=0.05)
    assert value["host"]["runtime_mib"] == 0


def test_experts_can_stay_in_ram() -> None:
    """Routed experts of the lowest layers move from the GPU to the host, byte for byte."""
    whole, part = (
        json.loads(CliRunner().invoke(estimate_command, [str(QWEN), "--json", *more]).output)
        for more in ([], ["--cpu-experts", "9"])
    )
    moved = whole["devices"][0]["weights_mib"] - part["devices"][0]["weights_mib"]
    assert moved > 1000
    assert part["host"]["weights_mib"] - whole["host"]["weights_mib"] == pytest.approx(moved, abs=0.05)


def test_the_table_shows_the_same_figures() -> None:
    """Without --json the same MiB stand in a table, whole."""
    output = CliRunner().invoke(estimate_command, [str(LLAMA), "--ctx", "4096", "--split", "41,40"]).output
    assert [word for word in ("21274", "656", "21058", "624", "host") if word not in output] == []


def test_the_table_says_when_the_cuda_context_is_not_counted() -> None:
    """Else its totals look smaller than those of `lopsided plan`; JSON stays JSON."""
    said = "CUDA's own context on each GPU is not counted"
    assert said in CliRunner().invoke(estimate_command, [str(LLAMA)]).output
    assert all(
        said not in CliRunner().invoke(estimate_command, [str(LLAMA), *more]).output
        for more in (["--runtime-mib", "527"], ["--json"])
    )
