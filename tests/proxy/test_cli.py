"""The command line as people and scripts meet it: what it prints, where, and with which exit code."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.gpus.static import StaticSource
from proxy.simulator import Simulator, create_app, demo_models
from proxy.wire.serve import OneLine
from tests.gguf_files import LLAMA, gguf
from tests.servers import free_port, serve

GGUF = Path(__file__).parent.parent / "data" / "gguf"
LLAMA_70B = str(GGUF / "llama3.3-70b-q4km.gguf")
PAIR = ("--gpu", "RTX 5090", "--gpu", "RTX 3090")
COMMAND = (sys.executable, "-c", "from proxy.cli import main; main(prog_name='lopsided')")
COMMANDS = ("calibrate", "demo", "devices", "doctor", "estimate", "launcher", "plan", "serve")
ANSWER_S = 120
"""Longest wait for a command: for one that hangs, not for a machine that is busy."""


def is_setting(name: str) -> bool:
    return name.startswith(("LOPSIDED_", "OLLAMA_", "CUDA_"))


def clean(**environment: str) -> dict[str, str]:
    """The environment of these tests without settings, and with ``environment``."""
    return {**{name: value for name, value in os.environ.items() if not is_setting(name)}, "COLUMNS": "160", **environment}


def lopsided(*arguments: str, **environment: str) -> Result:
    """A command run in this process, without any settings but ``environment``; no exception but an exit code leaves it."""
    unset = dict.fromkeys(filter(is_setting, os.environ))
    done = CliRunner(env={**unset, "COLUMNS": "160", **environment}).invoke(main, arguments, prog_name="lopsided")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def answer(*arguments: str, **environment: str) -> dict:
    done = lopsided(*arguments, "--json", **environment)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def running(*arguments: str, until: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that stays, once its output has ``until``; yields it with what it printed."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=clean(PYTHONUNBUFFERED="1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if until in line:
                break
        else:
            raise AssertionError(f"it ended with {process.wait(ANSWER_S)}: {printed}")
        yield process, printed
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=ANSWER_S)


def interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """``(exit code, rest of the output)`` after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=ANSWER_S)
    return process.returncode, rest


@pytest.fixture(scope="module")
def ollama() -> Iterator[str]:
    simulator = Simulator(
        StaticSource.from_arguments(["RTX 5090", "RTX 3090"]).rig(), demo_models(["llama3.1:8b", "llama3.3:70b"])
    )
    with serve(create_app(simulator), lifespan="off") as url:
        yield url


def test_help_lists_every_command_with_a_whole_sentence():
    done = lopsided("--help")
    assert done.exit_code == 0
    assert tuple(re.findall(r"^  (\w+)  +[A-Z].*\.$", done.stdout, re.MULTILINE)) == COMMANDS


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["nonsense"], {}, "No such command 'nonsense'"),
        (["plan"], {}, "Missing argument"),
        (["plan", LLAMA_70B, *PAIR, "--ctx", "0"], {}, "--ctx"),
        (["plan", LLAMA_70B, *PAIR, "--boost", "2.1"], {}, "a number from 1.0 to 2.0"),
        (["plan", LLAMA_70B, *PAIR, "--kv-type", "q9"], {}, "q8_0"),
        (["plan", LLAMA_70B, *PAIR], {"OLLAMA_SCHED_COMPUTE_BOOST": "fast"}, "OLLAMA_SCHED_COMPUTE_BOOST = 'fast'"),
        (["plan", LLAMA_70B, *PAIR, "--ollama-version", "new"], {}, "'new' is no version such as 0.24.0"),
        (["serve", "--host", "127.0.0.1:99999"], {}, "a port from 0 to 65535"),
        (["serve"], {"LOPSIDED_HOST": "127.0.0.1:11434"}, "LOPSIDED_UPSTREAM"),
        (["doctor"], {"OLLAMA_NUM_PARALLEL": "many"}, "OLLAMA_NUM_PARALLEL = 'many' is not allowed"),
    ],
)  # fmt: skip
def test_bad_usage_ends_with_2_and_says_what_is_allowed(arguments, environment, said):
    done = lopsided(*arguments, **environment)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "missing.gguf", *PAIR], "missing.gguf: no such file"),
        (["plan", "missing.gguf"], "missing.gguf: no such file"),
        (["plan", "README.md", *PAIR], "README.md"),
        (["plan", "lying.gguf", *PAIR], "its metadata and its tensors do not fit together (KeyError: 'laurel_l.weight')"),
        (["estimate", "lying.gguf", "--ctx", "4096"], "its metadata and its tensors do not fit together"),
        (["plan", LLAMA_70B, "--gpu", "RTX 9999"], "no card is known as 'RTX 9999'"),
        (["plan", LLAMA_70B, "--gpu", "RTX 3090:99GiB"], "RTX 3090"),
        (["devices", "--gpu", "RTX 3090:lots"], "write 22GiB"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_line(arguments, said, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("no model")
    (tmp_path / "lying.gguf").write_bytes(gguf({**LLAMA, "llama.altup.num_inputs": 4}))
    monkeypatch.chdir(tmp_path)
    done = lopsided(*arguments)
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_name_without_an_ollama_says_what_to_do():
    done = lopsided("plan", "llama3.1:8b", *PAIR, LOPSIDED_UPSTREAM=f"127.0.0.1:{free_port()}")
    assert done.exit_code == 1
    assert "LOPSIDED_UPSTREAM" in done.stderr
    assert done.stderr.count("\n") == 1


def test_devices_are_listed_in_the_order_given_with_their_shares_of_power():
    gpus = answer("devices", *PAIR)["gpus"]
    assert [(gpu["index"], gpu["name"], round(gpu["power_share"], 3)) for gpu in gpus] == [
        (0, "GeForce RTX 5090", 0.746),
        (1, "GeForce RTX 3090", 0.254),
    ]
    table = lopsided("devices", *PAIR).stdout
    assert re.search(r"0 +RTX 5090 +32\.0 GiB .* 74\.6%", table)
    assert re.search(r"1 +RTX 3090 +24\.0 GiB .* 25\.4%", table)


def test_devices_come_from_the_profile_of_the_settings(tmp_path):
    profile = tmp_path / "rig.toml"
    profile.write_text('[[gpu]]\nname = "RTX 4090"\nfree = "20GiB"\n')
    assert [gpu["name"] for gpu in answer("devices", LOPSIDED_PROFILE=str(profile))["gpus"]] == ["GeForce RTX 4090"]


@pytest.mark.parametrize("boost", ["auto", "1.0", "1.25", "1.5", "1.75", "2.0"])
def test_a_plan_has_the_shape_of_the_design_at_every_boost(boost):
    plan = answer("plan", LLAMA_70B, *PAIR, "--ctx", "8192", "--boost", boost)
    parts = {"model", "gpus", "request", "plan", "stock", "alternatives", "binding", "frontier", "reasons", "delivery"}
    assert plan.keys() == parts
    assert plan["request"]["num_ctx"] == 8192
    assert plan["request"]["boost"] == (boost if boost == "auto" else float(boost))
    assert [gpu.keys() for gpu in plan["gpus"]] == [{"uuid", "name", "free_bytes", "power_share"}] * 2
    assert plan["reasons"]
    assert plan["delivery"].keys() == {"options", "launcher"}
    for placed in (plan["plan"], plan["stock"], *plan["alternatives"]):
        assert placed.keys() >= {"kind", "layers", "output_gpu", "cpu_layers", "devices", "calibrated"}
        assert placed["decode_tokens_per_s"] > 0
        assert sum(placed["layers"]) + placed["cpu_layers"] + (placed["output_gpu"] is None) == 81
    for device in plan["plan"]["devices"]:
        assert device.keys() >= {"weights_bytes", "kv_bytes", "compute_bytes", "total_bytes", "limit_bytes"}
        assert device["total_bytes"] <= device["limit_bytes"]


def test_a_plan_is_told_with_ranges_bytes_both_eras_and_reasons():
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192").stdout
    assert "header only" in text
    runs = re.findall(r"^ (RTX \d+) +(\d+): (\d+)-(\d+) +(yes)? ", text, re.MULTILINE)
    assert {run[0] for run in runs} == {"RTX 5090", "RTX 3090"}
    (_, first, start, middle, no), (_, second, after, end, yes) = runs
    assert (int(start), int(after), int(end), no, yes) == (0, int(middle) + 1, 79, "", "yes")
    assert int(first) + int(second) == 80
    assert "stock ≥ 0.30 (yours)" in text
    assert "stock ≤ 0.24" in text
    assert re.search(r"Why\n  1\. ", text)


def test_a_plan_tells_what_bounds_it_and_what_room_there_is_for_context():
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192").stdout
    assert re.search(r"bound by the memory of RTX 5090: 0\.\d\d GiB are left, one layer more takes 0\.\d\d$", text, re.MULTILINE)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(.*RTX.*)$", text.partition("Room for context")[2], re.MULTILINE)
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    bound = answer("plan", LLAMA_70B, *PAIR, "--ctx", "8192")["binding"]
    assert bound["gpu"] == 0
    assert 0 <= bound["left_bytes"] < bound["layer_bytes"]


def test_a_plan_with_layers_in_ram_tells_which_context_would_leave_none_there():
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "65536").stdout
    said = re.search(
        r"\d+\. with a context of (\d+) nothing would lie in RAM: (.* on RTX 5090.*), [\d.]+ tok/s decode$", text, re.MULTILINE
    )
    assert re.search(rf"^ +{said[1]} +[\d.]+ +{re.escape(said[2])}$", text, re.MULTILINE)  # a row of the table
    assert "nothing would lie in RAM" not in lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192").stdout


def test_a_card_can_be_added_in_thought():
    asked = ("plan", LLAMA_70B, "--gpu", "RTX 5090", "--ctx", "8192")
    alone, both = answer(*asked), answer(*asked, "--add-gpu", "3090:20GiB")
    assert [gpu["name"] for gpu in both["gpus"]] == ["GeForce RTX 5090", "GeForce RTX 3090"]
    assert both["gpus"][1]["free_bytes"] == 20 * 2**30
    assert both["plan"]["decode_tokens_per_s"] > alone["plan"]["decode_tokens_per_s"]
    assert lopsided(*asked, "--add-gpu", "RTX 9999").exit_code == 1


def test_other_quantizations_are_planned_beside_the_models_own():
    found = answer("plan", LLAMA_70B, *PAIR, "--ctx", "8192", "--quant", "q3_k_m, Q4_K_M,Q5_K_M")["quantizations"]
    assert [one["name"] for one in found] == ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
    speeds = [one["plan"]["decode_tokens_per_s"] for one in found]
    assert speeds == sorted(speeds, reverse=True)
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192", "--quant", "Q8_0").stdout
    assert re.search(r"Quantized otherwise\n[\s\S]*\n Q8_0 +69\.\d GiB +\d+ in RAM", text)
    assert lopsided("plan", LLAMA_70B, *PAIR, "--quant", "Q9").exit_code == 2


def test_a_split_is_told_beside_what_request_options_make_of_it():
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192").stdout
    plan, by_options, stock = (re.search(rf"^ {label} .*", text, re.MULTILINE)[0] for label in ("plan", "by req.*?", "stock ≥"))
    figures = re.compile(r"[\d.]+ +\d+ +[\d.]+ \+ [\d.]+$")
    assert figures.findall(by_options) == figures.findall(stock) != figures.findall(plan)
    assert re.search(r"^X-Lopsided-Plan: split CUDA0=\d+,CUDA1=\d+; .* stock Ollama ignores$", text, re.MULTILINE)


def test_an_ollama_without_llama_server_is_shown_no_arguments_of_it():
    card_in_use = ("--gpu", "RTX 5090:20GiB", "--gpu", "RTX 3090", "--ctx", "16384", "--ollama-version", "0.24.0")
    text = lopsided("plan", str(GGUF / "mistral-small-24b-q4km.gguf"), *card_in_use).stdout
    assert "by request options    RTX 3090 alone" in text
    assert "can't be asked of this Ollama" in text
    assert "llama-server" not in text.partition("X-Lopsided-Plan")[2]


@pytest.mark.parametrize("boost", ["1.0", "2.0"])
def test_a_plan_that_has_no_room_in_ram_says_so(boost, tmp_path):
    rig = '[[gpu]]\nname = "RTX 5090"\n[[gpu]]\nname = "RTX 3090"\n[host]\ntotal = "32GiB"\nfree = "{free}"\n'
    said = []
    for free in ("1GiB", "32GiB"):
        (profile := tmp_path / "rig.toml").write_text(rig.format(free=free))
        done = lopsided("plan", LLAMA_70B, "--ctx", "65536", "--boost", boost, LOPSIDED_PROFILE=str(profile))
        said.append("1.0 GiB are free. Ollama may refuse" in done.stdout)
    assert said == [True, False]


def test_tables_fit_a_terminal_of_80_columns_and_lose_nothing():
    printed = [
        lopsided("devices", *PAIR, COLUMNS="80"),
        lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "131072", COLUMNS="80"),
        lopsided("demo", "--once", COLUMNS="80"),
    ]
    for done in printed:
        assert "…" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
    assert re.search(r"^ 0  RTX 5090 ", printed[0].stdout, re.MULTILINE)
    assert re.search(r"^ RTX 3090  +\d+: \d+-\d+ ", printed[1].stdout, re.MULTILINE)
    assert re.search(r"^ mistral-small:24b +16384 ", printed[2].stdout, re.MULTILINE)


def test_a_terminal_of_no_columns_is_one_of_unknown_width():
    for arguments in (("devices", *PAIR), ("plan", LLAMA_70B, *PAIR), ("estimate", LLAMA_70B, "--ctx", "4096")):
        assert len(lopsided(*arguments, COLUMNS="0").stdout) > 100


def test_a_model_of_the_ollama_behind_the_proxy_is_planned_by_its_name(ollama):
    by_name = answer("plan", "llama3.3:70b", *PAIR, "--ctx", "8192", LOPSIDED_UPSTREAM=ollama)
    by_file = answer("plan", LLAMA_70B, *PAIR, "--ctx", "8192")
    assert by_name["plan"]["layers"] == by_file["plan"]["layers"]
    assert by_name["model"]["name"] == "llama3.3:70b"


def test_the_plan_follows_the_version_of_ollama_that_is_named():
    text = lopsided("plan", LLAMA_70B, *PAIR, "--ctx", "8192", "--ollama-version", "0.24.0").stdout
    assert "stock ≤ 0.24 (yours)" in text


def test_a_console_without_the_signs_gets_others():
    done = subprocess.run(
        [*COMMAND, "plan", LLAMA_70B, *PAIR],
        env=clean(PYTHONIOENCODING="latin-1"),
        capture_output=True,
        encoding="latin-1",
        timeout=ANSWER_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "stock ? 0.30" in done.stdout


def test_a_name_from_a_client_forges_no_line_of_the_log():
    record = logging.LogRecord("lopsided", logging.INFO, "", 0, "%s: passes", ("a\n2026 INFO b\x1b[2J\u2028\u00e9",), None)
    assert OneLine("%(levelname)s %(message)s").format(record) == "INFO a?2026 INFO b?[2J?\u00e9: passes"


def test_output_into_a_closed_pipe_is_no_accident():
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [*COMMAND, "plan", LLAMA_70B, *PAIR, "--json"]
    closed = subprocess.run(
        arguments, env=clean(), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=ANSWER_S, check=False
    )
    os.close(writer)
    assert closed.stderr == ""
    assert closed.returncode == 1


def test_serve_says_where_it_listens_and_passes_requests_on_until_it_is_interrupted(ollama, tmp_path):
    profile = tmp_path / "rig.toml"
    profile.write_text('[[gpu]]\nname = "RTX 5090"\n[[gpu]]\nname = "RTX 3090"\n')
    port = free_port()
    with running(
        "serve", "--host", f"127.0.0.1:{port}", "--upstream", ollama, until="GPU 1", LOPSIDED_PROFILE=str(profile)
    ) as served:
        process, printed = served
        assert [line.split()[:2] for line in printed.splitlines()] == [
            ["lopsided", f"http://127.0.0.1:{port}"],
            ["Ollama", ollama],
            ["GPU", "0"],
            ["GPU", "1"],
        ]
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), trust_env=False) as client:
            assert client.get(f"http://127.0.0.1:{port}/api/version").json() == httpx.get(f"{ollama}/api/version").json()
        taken = lopsided("serve", "--host", f"127.0.0.1:{port}", "--upstream", ollama)
        assert taken.exit_code == 1
        assert f"another program listens on 127.0.0.1:{port}" in taken.stderr
        assert taken.stderr.count("\n") == 1
        circle = lopsided("serve", "--host", f"127.0.0.1:{free_port()}", "--upstream", f"127.0.0.1:{port}")
        assert circle.exit_code == 1
        assert "circle" in circle.stderr
        code, rest = interrupted(process)
    assert code == 0
    assert "Traceback" not in rest


def test_serve_starts_before_ollama_does_and_without_gpus():
    own, upstream = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with running("serve", "--host", own, "--upstream", upstream, until="GPUs", CUDA_VISIBLE_DEVICES="-1") as (_, printed):
        assert "does not answer yet" in printed
        assert "Requests pass unchanged" in printed
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), trust_env=False) as client:
            assert client.get(f"http://{own}/api/version").status_code == 502


@pytest.mark.parametrize("host", ["", "0.0.0.0", *(["[::]"] if socket.has_dualstack_ipv6() else [])])
def test_serve_on_every_address_is_reached_by_loopback_and_says_so(host):
    port = free_port()
    upstream = f"127.0.0.1:{free_port()}"
    with running("serve", "--host", f"{host}:{port}", "--upstream", upstream, until="GPUs") as (_, printed):
        assert "on every address of this machine" in printed
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), trust_env=False) as client:
            assert client.get(f"http://127.0.0.1:{port}/lopsided/health").json()["name"] == "lopsided"


def test_a_profile_that_says_nothing_is_refused_at_start(tmp_path):
    profile = tmp_path / "rig.toml"
    profile.write_text("[[gpu]]\n")
    done = lopsided("serve", "--host", f"127.0.0.1:{free_port()}", LOPSIDED_PROFILE=str(profile))
    assert done.exit_code == 1
    assert "gpu.1.name: Field required" in done.stderr


def test_the_doctor_ends_with_1_where_something_fails_and_0_where_not(ollama, tmp_path):
    profile = tmp_path / "rig.toml"
    profile.write_text('[[gpu]]\nname = "RTX 5090"\n[[gpu]]\nname = "RTX 3090"\n')
    own = f"127.0.0.1:{free_port()}"
    well = lopsided("doctor", "--json", LOPSIDED_UPSTREAM=ollama, LOPSIDED_PROFILE=str(profile), LOPSIDED_HOST=own)
    assert well.exit_code == 0
    assert {finding["level"] for finding in json.loads(well.stdout)["findings"]} == {"ok", "warn"}
    ill = lopsided("doctor", LOPSIDED_UPSTREAM=f"127.0.0.1:{free_port()}", LOPSIDED_PROFILE=str(profile), LOPSIDED_HOST=own)
    assert ill.exit_code == 1
    assert re.search(r"^fail  Ollama ", ill.stdout, re.MULTILINE)
