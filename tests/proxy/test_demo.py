"""The demo: what its table claims is what the simulated Ollama did, asked over real sockets."""

import json
import re

import httpx
import pytest

from proxy.demo import CASES, Outcome, open_stage
from tests.proxy.test_cli import answer, interrupted, lopsided, running

FAST, SLOW = 0, 1


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    with open_stage() as stage:
        return {case.model: stage.play(case) for case in CASES}


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


def test_nothing_is_slower_than_stock(outcomes):
    assert all(outcome.gain >= 0.999 for outcome in outcomes.values())


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
    assert len(value["rows"]) == len(CASES)


def test_it_stays_for_a_client_until_it_is_interrupted():
    with running("demo", until="Ctrl-C") as (process, printed):
        url = re.search(r"lopsided +(http://127\.0\.0\.1:\d+)", printed)[1]
        body = {"model": CASES[0].model, "prompt": "Hello", "stream": False, "options": {"num_predict": 4}}
        generated = httpx.post(f"{url}/api/generate", json=body, timeout=20)
        assert generated.status_code == 200
        assert generated.json()["eval_count"] > 0
        assert "x-lopsided-plan" in generated.headers
        assert json.loads(re.search(r"-d '(.*)'", printed)[1])["model"] == CASES[0].model
        code, rest = interrupted(process)
    assert code == 0
    assert "Traceback" not in rest
