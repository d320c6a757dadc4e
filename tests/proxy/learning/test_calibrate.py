"""``lopsided calibrate`` against a simulated Ollama whose cards are not as fast as their data say."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from planner.plan import make_plan
from planner.request import PlanRequest
from proxy import cli
from proxy.learning.calibrate import solo_trials
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from tests.planner import models
from tests.proxy.learning.test_calibration import MODEL, RIG, TRUTH, talk
from tests.servers import serve

MODELS = [model for model in demo_models() if model.name in {MODEL, "llama3.3:70b", "all-minilm:22m", "qwen3:0.6b"}]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs the command; gives its result, what it printed as JSON, and the simulator."""
    simulators = []

    def run(*arguments, speaker=talk, **environment):
        simulator = Simulator(RIG, MODELS, environment=Environment(rates=TRUTH, **environment), speaker=speaker, unload_s=0.2)
        simulators.append(simulator)
        monkeypatch.setattr(cli, "gpu_source", lambda *_: simulator)
        with serve(create_app(simulator)) as url:
            variables = {"LOPSIDED_UPSTREAM": url, "LOPSIDED_STATE": str(tmp_path), "LOPSIDED_CONFIG": None}
            done = CliRunner(env=variables).invoke(cli.main, ["calibrate", *arguments])
        return done, json.loads(done.stdout) if "--json" in arguments and done.stdout.startswith("{") else None, simulator

    return run


def test_it_finds_how_fast_each_card_really_is(stage):
    # shows: 30 % and 90 % of what the data predict, on each card alone, and nothing is left loaded
    done, found, simulator = stage(MODEL, "--ctx", "2048", "--json")
    assert done.exit_code == 0, done.output
    for gpu in found["gpus"]:
        decode, prefill = TRUTH.rates[gpu["uuid"]]
        assert gpu["measured"]["decode_bytes_per_s"] == pytest.approx(decode, rel=0.05)
        assert gpu["measured"]["prefill_flops_per_s"] == pytest.approx(prefill, rel=0.02)
    assert [trial["placement"] for trial in found["trials"]] == ["CUDA0 alone", "CUDA1 alone"]
    assert not simulator.scheduler.runners
    asked = [json.loads(request.body).get("options", {}) for request in simulator.requests if request.path == "/api/generate"]
    assert [options.get("main_gpu") for options in asked if options] == [0] * 4 + [1] * 4
    assert not any("num_gpu" in options for options in asked)  # there is room for llama.cpp's own margin
    assert cli.open_measurements(cli.load_settings(state="off")).class_rates(RIG)["dense"].rates == {}


def test_the_tables_and_the_plan_show_what_was_measured(stage):
    # shows: stock's placement too with --stock; afterwards devices shows the rates
    done, _, _ = stage(MODEL, "--stock")
    assert done.exit_code == 0, done.output
    assert "stock: solo CUDA0" in done.output
    assert "measured" in done.output
    assert "was not measured" not in done.output


def test_a_model_that_fits_no_card_is_measured_where_stock_puts_it(stage):
    done, found, _ = stage("llama3.3:70b", "--ctx", "4096", "--json")
    assert done.exit_code == 0, done.output
    (trial,) = found["trials"]
    assert trial["placement"].startswith("stock: split")
    assert trial["decode_tokens_per_s"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("all-minilm:22m",), "writes nothing that could be measured"), (("nobody:1b",), "Ollama has no model")],
)
def test_what_cannot_be_measured_is_said_in_a_line(stage, arguments, text):
    done, _, _ = stage(*arguments)
    assert done.exit_code == 1
    assert text in done.output


def test_stock_cannot_be_measured_under_spread(stage, monkeypatch):
    monkeypatch.setenv("OLLAMA_SCHED_SPREAD", "1")
    done, _, _ = stage(MODEL, "--stock")
    assert done.exit_code == 1
    assert "OLLAMA_SCHED_SPREAD" in done.output


def test_a_card_that_main_gpu_cannot_name_is_not_tried():
    cards = models.rig(models.gpu("a", 9000), models.gpu("v", 16_000, library="Vulkan"), models.gpu("b", 24_000))
    plan = make_plan(models.small(n_layers=4), cards, PlanRequest(num_ctx=4096))
    trials = {trial.label: trial.options["main_gpu"] for trial in solo_trials(plan, num_ctx=4096)}
    assert trials == {"Vulkan0 alone": 0, "CUDA1 alone": 1}
