"""The demo: what its table claims is what the simulated Ollama did, asked over real sockets."""

import json
import re

import httpx
import pytest

from planner.speed import gpu_rates
from proxy.demo import MACHINES, PAIR, Machine, Outcome, Summary, open_stage
from tests.proxy.test_cli import ANSWER_S, answer, interrupted, lopsided, running

FAST, SLOW = 0, 1


CASES = PAIR.cases


@pytest.fixture(scope="module")
def played() -> dict[Machine, list[Outcome]]:
    played = {}
    for machine in MACHINES:
        with open_stage(machine=machine) as stage:
            played[machine] = [stage.play(case) for case in machine.cases]
    return played


@pytest.fixture(scope="module")
def outcomes(played) -> dict[str, Outcome]:
    return {outcome.case.model: outcome for outcome in played[PAIR]}


def test_there_is_one_of_each_kind(outcomes):
    assert len(outcomes) >= 5
    assert any(sum(outcome.stock.layers) < 35 for outcome in outcomes.values())  # small
    assert {"qwen3:30b-a3b", "llama3.3:70b"} <= outcomes.keys()  # a mixture of experts, a 70B


@pytest.mark.parametrize(("model", "layers"), [("qwen2.5:32b", 65), ("qwen3:30b-a3b", 49)])
def test_what_fits_the_fast_card_runs_there_though_stock_splits_it(outcomes, model, layers):
    split = outcomes[model]
    assert min(split.stock.layers) > 0
    assert split.lopsided.layers == (layers, 0)
    assert split.gain > 1.2


@pytest.mark.parametrize("model", ["mistral-small:24b", "gpt-oss:20b"])
def test_what_stock_puts_on_the_slow_card_runs_on_the_fast_one(outcomes, model):
    assert outcomes[model].stock.layers[FAST] == 0
    assert outcomes[model].lopsided.layers[SLOW] == 0
    assert outcomes[model].gain > 1.2


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: " + ".join(machine.cards))
def test_no_model_is_slower_than_stock_on_any_machine(played, machine):
    # shows: by the options of a request, and with the launcher
    assert len(played[machine]) == len(machine.cases) >= 6
    for outcome in played[machine]:
        assert outcome.gain >= 0.999, outcome
        assert outcome.launcher_gain >= 0.999, outcome


def test_the_simulated_cards_are_not_as_fast_as_the_planner_believes():
    # shows: each card of each machine is off its data by something, up to a fifth
    for machine in MACHINES:
        with open_stage(machine=machine) as stage:
            true = stage.simulator.environment.rates.rates
            for gpu in stage.simulator.rig().gpus:
                ratio = true[gpu.uuid][0] / gpu_rates(gpu).decode_bytes_per_s
                assert ratio != 1
                assert ratio == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: " + ".join(machine.cards))
def test_where_stock_is_poor_the_median_gains(played, machine):
    summary = Summary.of(machine, played[machine])
    assert summary.poor >= 1
    assert 1.05 < summary.median_gain <= summary.median_launcher_gain


def test_a_plan_that_options_cannot_deliver_is_said_to_be_a_prediction(outcomes):
    large = outcomes["llama3.3:70b"]
    assert large.lopsided == large.stock
    assert large.planned is not None
    assert large.planned.tokens_per_s > large.stock.tokens_per_s
    assert outcomes["qwen2.5:32b"].planned is None


def test_the_table_comes_once_says_that_it_is_simulated_and_ends_with_0():
    done = lopsided("demo", "--once")
    assert done.exit_code == 0
    assert "SIMULATED: RTX 5090 + RTX 3090" in done.stdout
    assert re.findall(r"^ (\S+:\S+) +\d+ +\S.* \d\.\d\d× ", done.stdout, re.MULTILINE) == [case.model for case in CASES]
    assert "Still running" not in done.stdout


def test_the_older_era_and_json():
    value = answer("demo", "--era", "runner")
    assert value["simulated"] is True
    assert value["ollama"] == "0.24.0"
    assert [len(rig["rows"]) for rig in value["rigs"]] == [len(machine.cases) for machine in MACHINES]
    assert all(rig["least_gain"] >= 0.999 for rig in value["rigs"])


def test_it_stays_for_a_client_until_it_is_interrupted():
    with running("demo", until="Ctrl-C") as (process, printed):
        url = re.search(r"lopsided +(http://127\.0\.0\.1:\d+)", printed)[1]
        body = {"model": CASES[0].model, "prompt": "Hello", "stream": False, "options": {"num_predict": 4}}
        generated = httpx.post(f"{url}/api/generate", json=body, timeout=ANSWER_S)
        assert generated.status_code == 200
        assert generated.json()["eval_count"] > 0
        assert "x-lopsided-plan" in generated.headers
        offered = json.loads(re.search(r"-d '(.*)'", printed)[1])
        asked = {"model": offered["model"], **offered["options"]}
        planned = httpx.get(f"{url}/lopsided/plan", params=asked, timeout=ANSWER_S).json()
        assert planned["plan"]["layers"] != planned["stock"]["layers"]  # else the client sees stock's own placement
        code, rest = interrupted(process)
    assert code == 0
    assert "Traceback" not in rest
