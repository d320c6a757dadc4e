"""What people are shown: the page at /lopsided/, and what stands behind it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from planner.placement import solo
from planner.request import PlanRequest
from planner.units import GIB
from proxy.dashboard import PAGE, page
from proxy.gpus.static import StaticSource
from proxy.launcher.installation import Installation, State
from proxy.ollama.client import Loaded
from proxy.ollama.options import Delivery
from proxy.overview import Overview, launcher_json
from proxy.placing.inforce import InForce
from proxy.placing.running import Running
from tests.planner import models
from tests.proxy.planners import make
from tests.proxy.upstreams import proxy_before, upstream
from tests.servers import free_port

PAIR = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"])


@pytest.fixture(scope="module")
def url():
    with proxy_before(f"http://127.0.0.1:{free_port()}", source=PAIR) as base_url:
        yield base_url


def test_the_page_is_whole_and_a_browser_takes_nothing_from_elsewhere(url):
    answer = httpx.get(url + "/lopsided/", timeout=10)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.content == PAGE.read_bytes()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", policy)) == 2
    # what the policy would stop: attributes with code or style, and anything from another place
    assert not re.search(r"<[a-z][^>]*\s(style|on\w+|src|href)=", answer.text)
    assert not re.search(r"https?://", answer.text)
    assert "innerHTML" not in answer.text  # names of models and cards are texts


def test_without_the_slash_it_is_found_too(url):
    assert httpx.get(url + "/lopsided", follow_redirects=True, timeout=10).content == PAGE.read_bytes()


@pytest.mark.parametrize("headers", [{"host": "evil.example.com"}, {"origin": "https://evil.example.com"}])
def test_the_page_is_for_local_names_as_all_that_is_lopsideds_own(url, headers):
    for path in ("/lopsided/", "/lopsided/launcher"):
        assert httpx.get(url + path, headers=headers, timeout=10).status_code == 403


def test_the_policys_hashes_change_with_the_page(monkeypatch, tmp_path):
    other = tmp_path / "index.html"
    other.write_text(PAGE.read_text().replace("EVERY_MS = 2000", "EVERY_MS = 2001"))
    before = page()[1]["content-security-policy"]
    monkeypatch.setattr("proxy.dashboard.PAGE", other)
    assert page()[1]["content-security-policy"] != before


def test_all_that_the_page_reads_is_there(url):
    names = re.search(r"const names = (\[.*?\]);", PAGE.read_text())[1]
    asked = re.findall(r"\w+", names)
    assert asked == ["health", "launcher", "devices", "models"]
    statuses = {name: httpx.get(f"{url}/lopsided/{name}", timeout=10).status_code for name in asked}
    assert statuses == {"health": 200, "launcher": 200, "devices": 200, "models": 502}  # there is no Ollama
    assert [gpu["device"] for gpu in httpx.get(url + "/lopsided/devices", timeout=10).json()["gpus"]] == ["CUDA0", "CUDA1"]


@pytest.mark.parametrize(
    ("found", "answering", "places_all", "state", "delivery"),
    [
        ("installed", True, True, "answering", "launcher"),
        (None, True, False, "answering", "launcher and options"),
        ("installed", False, False, "silent", "options"),
        ("replaced", False, False, "gone", "options"),
        ("lost", False, False, "broken", "options"),
        ("interrupted", False, False, "broken", "options"),
        ("absent", False, False, "absent", "options"),
        ("none", False, False, "unseen", "options"),
        (None, False, False, "unseen", "options"),
    ],
)
def test_the_launchers_state_is_said(found: State | None, answering, places_all, state, delivery):
    installation = Installation(library=Path("/lib"), state=found) if found else None
    said = launcher_json(answering=answering, places_all=places_all, found=installation)
    assert (said["state"], said["delivery"]) == (state, delivery)
    assert said["text"]
    assert ("an update of Ollama" in said["text"]) is (state == "gone")


async def row_of(*, vram_bytes: int, context: int) -> dict:
    """The row of a model that was planned for the second GPU with 8192 tokens."""
    slow, fast = (solo(gpu, n_gpus=2, n_layers=8) for gpu in (1, 0))
    plan = make(models.small(n_layers=8), PAIR.rig(), PlanRequest(), slow, fast, used_bytes=8 * GIB)
    placed = InForce(
        model="m", blob="b", digest="d", num_ctx=None, planned_ctx=8192, delivery=Delivery(text="solo CUDA1; auto"), careful=0
    )

    async def loaded():
        return (Loaded(name="m", digest="d", vram_bytes=vram_bytes, context_length=context),)

    async def rig():
        return PAIR.rig()

    placements = SimpleNamespace(
        in_force=lambda: (placed,),
        running=lambda _: Running(name="m", blob="b", plan=plan, candidate=plan.chosen),
    )
    overview = Overview(
        ollama=SimpleNamespace(loaded=loaded),
        catalog=None,
        gpus=SimpleNamespace(rig=rig, live=False),
        placements=placements,
        launches=None,
        calibrator=SimpleNamespace(speeds=lambda _: {}),
        settings=None,
    )
    (row,) = (await overview.models())["models"]
    assert row["predicted_bytes"] == [0, 8 * GIB]
    return row


async def test_what_is_not_as_it_was_planned_is_said():
    row = await row_of(vram_bytes=1, context=4096)
    assert "were expected" in row["misplaced"]
    assert row["context_note"] == "8192 tokens of context were planned"
    well = await row_of(vram_bytes=sum(row["predicted_bytes"]), context=8192)
    assert (well["misplaced"], well["context_note"]) == (None, None)


@pytest.mark.parametrize("name", ["a", "a\ud800"], ids=["its file cannot be opened", "half a surrogate pair in its name"])
def test_a_loaded_model_of_which_nothing_can_be_known_is_shown_all_the_same(name):
    loaded = {"name": name, "digest": "1" * 64, "size_vram": GIB, "context_length": 4096, "size": GIB}

    def script(request, conversation):
        if request.target == "/api/show":
            conversation.answer_json({"error": "open blobs/sha256-1: no such file or directory"}, 500)
        else:
            conversation.answer_json({"models": [loaded]})

    with upstream(script) as ollama, proxy_before(ollama.url, source=PAIR) as url:
        answer = httpx.get(url + "/lopsided/models", timeout=10)
    assert answer.status_code == 200
    assert [(row["placement"], row["actual_vram_bytes"]) for row in answer.json()["models"]] == [("loaded past lopsided", GIB)]
