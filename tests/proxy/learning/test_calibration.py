"""Learning from traffic, before a simulated Ollama whose cards are not as fast as their data say."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from planner.placement import solo
from planner.plan import make_plan
from planner.request import PlanRequest
from planner.speed import Calibration, gpu_rates
from proxy.gpus.static import StaticSource
from proxy.learning import calibration
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from proxy.simulator.replies import Spoken
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

RIG = StaticSource.from_arguments(("RTX 5090:31500MiB", "RTX 3090:23700MiB")).rig()
TRUTH = Calibration(
    rates={
        gpu.uuid: (gpu_rates(gpu).decode_bytes_per_s * part, gpu_rates(gpu).prefill_flops_per_s * part)
        for gpu, part in zip(RIG.gpus, (0.3, 0.9), strict=True)
    }
)
"""The RTX 5090 stands in a bad slot with a power limit: it reaches 30 % of what its data promise."""
MODEL = "phi4:14b"
MODELS = [model for model in demo_models() if model.name in {MODEL, "qwen3:0.6b"}]
WORDS = 200


def talk(prompt):
    pieces = tuple(f" word{i}" for i in range(WORDS))
    return Spoken(pieces=pieces, count=WORDS, reason="stop", calls=())


class Stage:
    """The proxy's URL, the simulator behind it, and a client."""

    def __init__(self, url, simulator, client):
        self.url, self.simulator, self.client, self.asked = url, simulator, client, 0

    def ask(self, *, model=MODEL, words=4000, path="/api/generate", **fields):
        self.asked += 1
        text = f"{self.asked} " + "word " * words
        what = {"prompt": text} if path == "/api/generate" else {"messages": [{"role": "user", "content": text}]}
        body = {"model": model, "stream": False, "options": {"num_ctx": 4096}, **what, **fields}
        answer = self.client.post(self.url + path, json=body)
        answer.raise_for_status()
        return answer

    def get(self, path):
        return self.client.get(self.url + path).json()

    def plan(self, model=MODEL):
        return self.get(f"/lopsided/plan?model={model}&num_ctx=4096")


@contextmanager
def stage(planner=make_plan, *, rates=TRUTH, era="llama-server", time_scale=0.0, **settings):
    environment = Environment(era=era, keep_alive_s=60, rates=rates)
    simulator = Simulator(RIG, MODELS, environment=environment, time_scale=time_scale, speaker=talk)
    with (
        serve(create_app(simulator)) as ollama,
        proxy_before(ollama, source=simulator, planner=planner, **settings) as url,
        httpx.Client(timeout=30, trust_env=False) as client,
    ):
        yield Stage(url, simulator, client)


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def on(index):
    def planner(profile, rig, request):
        plan = make_plan(profile, rig, request)
        label = solo(index, n_gpus=2, n_layers=profile.n_layers)
        wanted = next(c for c in (*plan.alternatives, plan.stock) if c.placement == label)
        return replace(plan, chosen=wanted, chosen_by_options=wanted)

    return planner


def kept(state, count):
    """The answers in the state file once there are ``count``: reads, decode tokens and seconds, prompt tokens and seconds."""
    file = state / "measurements.json"

    def answers():
        return [answer for run in json.loads(file.read_text())["runs"] for answer in run["answers"]] if file.exists() else []

    until(lambda: len(answers()) >= count)
    return answers()


@pytest.fixture(autouse=True)
def _write_soon(monkeypatch):
    monkeypatch.setattr(calibration, "SAVE_S", 0.05)


def test_answers_find_how_fast_a_card_really_is_and_the_next_plan_uses_it(tmp_path):
    # shows: predicted first; after a few answers the 5090's true rates, in plan, devices and models; kept over a restart
    with stage(state=str(tmp_path)) as it:
        before = it.plan()
        assert before["plan"]["kind"] == "solo"
        assert not before["plan"]["calibrated"]
        assert before["plan"]["layers"][0]
        for _ in range(4):
            it.ask()
        until(lambda: it.get("/lopsided/models")["models"][0]["measured_tokens_per_s"])
        until(lambda: it.get("/lopsided/devices")["gpus"][0]["measured"])
        gpu = it.get("/lopsided/devices")["gpus"][0]
        truth = TRUTH.rates[gpu["uuid"]]
        assert gpu["measured"]["dense"]["decode_bytes_per_s"] == pytest.approx(truth[0], rel=0.02)
        assert gpu["measured"]["dense"]["prefill_flops_per_s"] == pytest.approx(truth[1], rel=0.05)
        assert gpu["predicted"]["decode_bytes_per_s"] == pytest.approx(truth[0] / 0.3)
        (row,) = it.get("/lopsided/models")["models"]
        assert row["measured_tokens_per_s"] == pytest.approx(row["predicted_tokens_per_s"] * 0.3, rel=0.2)
    with stage(state=str(tmp_path)) as it:
        assert it.get("/lopsided/devices")["gpus"][0]["measured"]["dense"]["decode_bytes_per_s"] == pytest.approx(
            truth[0], rel=0.02
        )
        plan = it.plan()
        fastest = [plan["plan"], *plan["alternatives"]]
        assert any(candidate["calibrated"] for candidate in fastest)


def test_what_overlaps_on_a_card_is_not_counted(tmp_path):
    # shows: both of two requests that ran at once are left out, the one after them is not
    with stage(state=str(tmp_path), time_scale=0.02) as it, ThreadPoolExecutor(2) as pool:
        it.ask()
        list(pool.map(lambda _: it.ask(), range(2)))
        it.ask(options={"num_ctx": 4096, "num_predict": 40})
        until(lambda: kept(tmp_path, 1)[-1][1] != WORDS)  # the last one: they are taken in in their order
        assert len(kept(tmp_path, 2)) == 2


def test_what_overlaps_on_different_cards_is_counted(tmp_path):
    # shows: two models, each on a card of its own, do not slow each other down
    def planner(profile, rig, request):
        return on(int(profile.n_layers == MODELS[0].profile.n_layers))(profile, rig, request)

    with stage(planner, state=str(tmp_path), time_scale=0.02) as it, ThreadPoolExecutor(2) as pool:
        names = [model.name for model in MODELS]
        for name in names:  # both are loaded
            it.ask(model=name)
        kept(tmp_path, 2)
        list(pool.map(lambda name: it.ask(model=name), names))
        assert len(kept(tmp_path, 4)) == 4


def test_a_prompt_that_a_cache_may_know_counts_for_the_answer_alone(tmp_path):
    # shows: llama-server's cache makes the second one read in no time, but Ollama counts its tokens
    with stage(state=str(tmp_path)) as it:
        it.ask(prompt="the same beginning " * 300)
        kept(tmp_path, 1)  # they are taken in beside the traffic, in whatever order
        it.ask(prompt="the same beginning " * 300 + "and another end")
        kept(tmp_path, 2)
        it.ask(path="/api/chat", stream=True)
        assert [(answer[1], answer[3] > 0) for answer in kept(tmp_path, 3)] == [(200, True), (200, False), (200, True)]


def test_answers_of_a_model_that_is_not_where_its_plan_says_teach_nothing(tmp_path, caplog):
    # shows: Ollama's device order is another one than believed, the driver shows it
    def mirrored(profile, rig, request):
        return on(0)(profile, replace(rig, gpus=tuple(reversed(rig.gpus))), request)

    with stage(mirrored, state=str(tmp_path)) as it:
        assert it.ask().headers["x-lopsided-plan"] == "solo CUDA0; auto"
        until(lambda: "is not where its plan has it" in caplog.text)
    assert "GeForce RTX 3090 holds 0.9 GiB" in caplog.text
    kept = json.loads((tmp_path / "measurements.json").read_text())
    assert (kept["runs"], kept["speeds"]) == ([], [])


def test_a_plan_that_turns_out_slower_than_stock_is_taken_back(tmp_path, caplog):
    # shows: stock is measured first, then a plan that is believed to be faster; it goes once it has lost, and stays away
    planners = [on(0)]

    def planner(profile, rig, request):
        plan = planners[0](profile, rig, request)
        return replace(plan, chosen=plan.stock, chosen_by_options=plan.stock) if planners[0] is not wrong else plan

    wrong = on(1)
    with stage(planner, state=str(tmp_path), rates=None) as it:
        assert [it.ask().headers["x-lopsided-plan"] for _ in range(3)] == ["stock; auto; nothing is faster"] * 3
        kept(tmp_path, 3)
        it.client.post(it.url + "/api/generate", json={"model": MODEL, "keep_alive": 0}).raise_for_status()
        until(lambda: not it.get("/api/ps")["models"])
        threading.Event().wait(1.1)  # placement.LOOK_S
        planners[0] = wrong
        for _ in range(3):
            assert it.ask().headers["x-lopsided-plan"].startswith("solo CUDA1; auto")
        until(lambda: "goes where stock puts it" in caplog.text)
        header = it.ask().headers["x-lopsided-plan"]
        assert header.startswith("stock; auto; measured ")
        assert it.ask().headers["x-lopsided-plan"] == header
        plan = it.plan()
        assert plan["plan"] == plan["stock"]
        assert sum(reason.startswith("taken back: RTX 3090 alone, measured") for reason in plan["reasons"]) == 1
        until(lambda: it.get("/lopsided/models")["models"][0]["reverted"])
        assert it.simulator.scheduler.count("load") + it.simulator.scheduler.count("reload") == 3


def test_the_objective_is_learned_from_each_models_turns(tmp_path):
    # shows: long prompts and short answers: what is planned for is that turn, once eight are known
    seen = []

    def planner(profile, rig, request):
        seen.append(request.objective)
        return make_plan(profile, rig, request)

    with stage(planner, state=str(tmp_path), rates=None, objective="auto") as it:
        for _ in range(8):
            it.ask(words=3000, options={"num_ctx": 4096, "num_predict": 40})
        kept(tmp_path, 8)
        it.plan()
    assert seen[0] == "decode"
    prompt, answer = seen[-1]
    assert (prompt, answer) == (pytest.approx(3000, rel=0.1), 40)


def test_in_the_older_era_stocks_own_placement_teaches(tmp_path, caplog):
    # shows: there num_gpu is all that can be asked for; layers that a client put in RAM stay there for all, and are noticed
    with stage(state=str(tmp_path), era="runner") as it:
        assert it.ask().headers["x-lopsided-plan"].startswith("stock; auto")
        assert len(kept(tmp_path, 1)) == 1
    with stage(era="runner") as it:
        it.ask(options={"num_ctx": 4096, "num_gpu": 20})
        it.ask()
        until(lambda: "GiB lie on GPUs" in caplog.text)


@pytest.mark.parametrize("wish", [{"gpu": 1, "gpu_reason": "a rule"}, {"boost": 1.5}])
def test_what_somebody_asked_for_is_not_taken_back(wish):
    # shows: a rule's card, or a boost, is a wish and no prediction, however slow it turns out
    profile = next(model.profile for model in MODELS if model.name == MODEL)
    slower = SimpleNamespace(speeds=lambda place: (10.0 if place.placement.order == (1,) else 20.0,) * 8)
    learned = calibration.LearnedPlanner(planner=on(1), measurements=slower, objective="decode")
    for asked, lost in (({}, True), (wish, False)):
        plan = on(1)(profile, RIG, PlanRequest(num_ctx=4096, **asked))
        assert (learned.loss(plan, plan.chosen) is not None) is lost
