"""Placements in force outlive the proxy: a proxy that was killed goes on as before, and no model is loaded again for it."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.placement import solo
from planner.units import GIB
from proxy.address import Address
from proxy.gpus.static import StaticSource
from proxy.learning.calibration import SPEED_FIELDS
from proxy.ollama.options import Delivery
from proxy.placing import placement
from proxy.placing.inforce import InForce, Ledger, file_name, from_json, to_json
from proxy.simulator import Simulator, create_app, demo_models
from proxy.simulator.placement import Environment
from proxy.statefile import StateFile
from tests.proxy.planners import planner_for
from tests.proxy.processes import lopsided_serve
from tests.proxy.upstreams import proxy_before
from tests.servers import serve

MODEL, OTHER = "phi4:14b", "qwen3:0.6b"
HEADER = "x-lopsided-plan"


def on(index):
    return planner_for(lambda profile: solo(index, n_gpus=2, n_layers=profile.n_layers))


@pytest.fixture
def ollama():
    """A simulated Ollama that outlives the proxies of a test, and its URL."""
    rig = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
    models = [model for model in demo_models() if model.name in (MODEL, OTHER)]
    simulator = Simulator(rig, models, environment=Environment(keep_alive_s=60))
    with serve(create_app(simulator)) as url:
        yield simulator, url


@contextmanager
def asking(ollama, state, index):
    """A proxy whose plans are ``index``, and a function that asks it."""
    simulator, upstream = ollama
    with proxy_before(upstream, source=simulator, planner=on(index), state=str(state)) as url:

        def ask(model=MODEL, **options):
            body = {"model": model, "prompt": "x", "stream": False, "options": {"num_predict": 1, **options}}
            return httpx.post(url + "/api/generate", json=body, timeout=20).headers[HEADER]

        ask.url = url
        yield ask


def placements_of(url):
    """The models in force, without what takes their plan to tell: one that was taken over is not made anew."""
    rows = httpx.get(url + "/lopsided/models").json()["models"]
    return [{name: value for name, value in row.items() if name not in (*SPEED_FIELDS, "misplaced")} for row in rows]


def test_a_loaded_models_plan_is_the_same_after_a_restart_and_nothing_reloads(ollama, tmp_path):
    # shows: the second proxy would place it elsewhere, and goes on with what is in force; other models are planned anew
    simulator, _ = ollama
    with asking(ollama, tmp_path, 1) as ask:
        assert ask(num_ctx=4096) == "solo CUDA1; auto"
        before = placements_of(ask.url)
    simulator.gpus.occupy(1, 8 * GIB)
    with asking(ollama, tmp_path, 0) as ask:
        assert placements_of(ask.url) == before
        assert [ask(num_ctx=4096) for _ in range(2)] == ["solo CUDA1; auto"] * 2
        assert ask(OTHER) == "stock; auto; nothing is faster"
    with asking(ollama, tmp_path, 1) as ask:
        assert ask(num_ctx=4096) == "solo CUDA1; auto"
        assert ask(OTHER) == "stock; auto; nothing is faster"
    assert [event.kind for event in simulator.scheduler.history if event.kind in ("load", "reload")] == ["load", "load"]


def test_that_ollama_spreads_models_is_known_after_a_restart_without_the_launcher(ollama, tmp_path, monkeypatch):
    # shows: an update of Ollama took the launcher away, then the machine was started anew: stock would go on both cards
    _, upstream = ollama
    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    launch = f"CUDA_VISIBLE_DEVICES=0,1\nOLLAMA_SCHED_SPREAD=1\n\n--model\n/sha256-{'0' * 64}\n-c\n4096\n"
    with proxy_before(upstream, source=ollama[0], state=str(tmp_path)) as url:
        body = {"model": MODEL, "prompt": "x", "stream": False, "options": {"num_predict": 1, "num_ctx": 4096}}
        httpx.post(url + "/api/generate", json=body, timeout=20).raise_for_status()
        httpx.post(url + "/lopsided/launch", content=launch).raise_for_status()
        httpx.post(url + "/api/generate", json=body, timeout=20).raise_for_status()
    httpx.post(upstream + "/api/generate", json={"model": MODEL, "keep_alive": 0})
    with proxy_before(upstream, source=ollama[0], state=str(tmp_path)) as url:
        assert httpx.post(url + "/api/generate", json=body, timeout=20).headers[HEADER] == "solo CUDA0; auto"


def test_a_model_that_ended_meanwhile_is_planned_anew(ollama, tmp_path):
    _, upstream = ollama
    with asking(ollama, tmp_path, 1) as ask:
        assert (ask(), ask(OTHER)) == ("solo CUDA1; auto",) * 2
    httpx.post(upstream + "/api/generate", json={"model": MODEL, "keep_alive": 0})
    httpx.post(upstream + "/api/generate", json={"model": OTHER, "keep_alive": 0})
    with asking(ollama, tmp_path, 0) as ask:
        assert ask() == "stock; auto; nothing is faster"
        assert [row["model"].split("/")[-1] for row in httpx.get(ask.url + "/lopsided/models").json()["models"]] == [MODEL]


def test_an_ollama_that_does_not_answer_yet_costs_no_plan_in_force(ollama, tmp_path, monkeypatch):
    # shows: what was in force is the best that can be known, until /api/ps answers
    from proxy.simulator.http import error
    from proxy.simulator.server import ROUTES

    async def refuses(_exchange):
        return error(500, "not now")

    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    with asking(ollama, tmp_path, 1) as ask:
        ask()
    with asking(ollama, tmp_path, 0) as ask:
        with monkeypatch.context() as broken:
            broken.setitem(ROUTES["/api/ps"], "GET", refuses)
            assert ask() == "solo CUDA1; auto"
        assert ask() == "solo CUDA1; auto"


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format":1}', b'{"format":1,"in_force":[{}]}', b'{"format":1,"in_force":[7]}'])
def test_a_broken_file_is_moved_aside_and_plans_are_made_anew(ollama, tmp_path, damage):
    with asking(ollama, tmp_path, 1) as ask:
        ask()
    (file,) = tmp_path.glob("in-force-*.json")
    file.write_bytes(damage)
    with asking(ollama, tmp_path, 0) as ask:
        assert ask() == "stock; auto; nothing is faster"
    assert sorted(path.name for path in tmp_path.glob("in-force-*")) == [file.name, f"{file.name}.corrupt"]


def test_without_a_place_for_it_everything_else_works(ollama, tmp_path):
    (tmp_path / "file").write_text("")
    with asking(ollama, tmp_path / "file", 1) as ask:
        assert [ask(), ask()] == ["solo CUDA1; auto"] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
def test_killed_with_9_and_started_again_it_sends_what_it_sent_before(ollama, tmp_path):
    # shows: a real process, no handler runs; the second one sees other cards, and would send another main_gpu
    simulator, upstream = ollama
    sent = []
    for cards in (("RTX 3090", "RTX 5090:12GiB"), ("RTX 5090:12GiB", "RTX 3090")):
        with lopsided_serve(upstream, tmp_path, cards) as served:
            body = {"model": OTHER, "prompt": "x", "stream": False, "options": {"num_ctx": 4096}}
            assert httpx.post(served.url + "/api/generate", json=body, timeout=20).status_code == 200
            served.process.send_signal(signal.SIGKILL)
            served.process.wait(10)
        asked = [request for request in simulator.requests if request.path == "/api/generate"]
        sent.append(json.loads(asked[-1].body).get("options"))
    assert sent == [{"main_gpu": 1, "num_ctx": 4096}] * 2
    assert simulator.scheduler.count("reload") == 0


texts = st.text(max_size=20)
numbers = st.integers(0, 2**63 - 1)
deliveries = st.builds(
    Delivery,
    text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    options=st.dictionaries(texts, numbers | texts, max_size=3),
    without=st.frozensets(texts, max_size=2),
    by_launcher=st.booleans(),
)
placements = st.builds(
    InForce,
    model=texts,
    blob=texts,
    digest=texts,
    num_ctx=st.none() | numbers,
    delivery=deliveries,
    careful=st.integers(0, 2),
    plan=st.none(),
    planned_ctx=st.none() | numbers,
    held_bytes=st.none() | st.lists(numbers, max_size=4).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(placements)
def test_what_is_written_is_what_is_read(in_force):
    assert from_json(json.loads(json.dumps(to_json(in_force)))) == in_force


@given(
    placements,
    st.sampled_from([*to_json(InForce(model="", blob="", digest="", num_ctx=None, delivery=Delivery(text=""), careful=0))]),
    json_values,
)
def test_any_other_value_in_a_row_is_refused_or_of_the_right_type(in_force, key, value):
    try:
        read = from_json({**to_json(in_force), key: value})
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    assert from_json(json.loads(json.dumps(to_json(read)))) == read


def test_each_ollama_has_its_own_file_with_a_plain_name():
    names = {
        file_name(Address(host=host, port=port, path=path))
        for host, port, path in [("127.0.0.1", 1, ""), ("127.0.0.1", 2, ""), ("::1", 1, ""), ("a", 1, "x/../y"), ("a", 1, "")]
    }
    assert len(names) == 5
    assert all(name.startswith("in-force-") and "/" not in name and ":" not in name for name in names)


async def test_the_last_change_is_what_is_kept_whoever_waits(tmp_path):
    # shows: a change while the file is being written is written too
    rows = []
    file = StateFile(tmp_path, "x.json")
    ledger = Ledger(file, lambda: tuple(rows))
    for count in range(5):
        rows.append(InForce(model=str(count), blob=str(count), digest="", num_ctx=None, delivery=Delivery(text=""), careful=0))
        await ledger.keep()
        assert [row.model for row in Ledger(file, tuple).read()] == [row.model for row in rows]
