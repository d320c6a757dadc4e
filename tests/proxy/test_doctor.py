"""What the doctor sees on real sockets, and what it makes of it."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from planner.hardware import Gpu, Rig
from proxy.config.settings import Settings, load_settings
from proxy.doctor import Sight, judge, look
from proxy.errors import GpuError
from proxy.gpus.order import DeviceOrder
from proxy.gpus.static import StaticSource
from proxy.launcher.installation import Installation
from tests.servers import free_port, serve

PAIR = StaticSource.from_arguments(["RTX 5090", "RTX 3090"])


def json_app(answers: dict):
    """Answers GET requests for the paths in ``answers``, all others with 404."""

    async def app(scope, receive, send):
        answer = answers.get(scope["path"])
        body = json.dumps(answer or {"error": "not found"}).encode()
        start = {"status": 404 if answer is None else 200, "headers": [(b"content-length", b"%d" % len(body))]}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": body})

    return app


OLLAMA = json_app({"/api/version": {"version": "0.32.15"}, "/api/tags": {"models": [{"name": "a"}, {"name": "b"}]}})
LOPSIDED = json_app(
    {"/lopsided/health": {"name": "lopsided"}, "/api/version": {"version": "0.32.15"}, "/api/tags": {"models": []}}
)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path):
    for variable in [name for name in os.environ if name.startswith(("LOPSIDED_", "OLLAMA_", "CUDA_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def settings(*, listen: int, upstream: str) -> Settings:
    return load_settings(host=f"127.0.0.1:{listen}", upstream=upstream)


def sight(**changes) -> Sight:
    """A machine on which all is well."""
    known = {
        "settings": load_settings(),
        "order": DeviceOrder(by_pci=True),
        "version": "0.32.15",
        "models": 2,
        "listener": "lopsided",
        "rig": PAIR.rig(),
    }
    return Sight(**{**known, **changes})


def found(seen: Sight, subject: str) -> tuple[str, str]:
    """``(level, text and advice)`` of the one finding on ``subject``."""
    (finding,) = (finding for finding in judge(seen) if finding.subject == subject)
    return finding.level, f"{finding.text} {finding.advice}"


async def test_a_running_ollama_is_seen_with_its_version_and_models():
    with serve(OLLAMA, lifespan="off") as url:
        seen = await look(settings(listen=free_port(), upstream=url), DeviceOrder(), PAIR)
    assert (seen.version, seen.models, seen.listener, seen.upstream_is_lopsided) == ("0.32.15", 2, "nobody", False)
    assert seen.rig is not None
    assert seen.rig.gpus == PAIR.rig().gpus


async def test_lopsided_in_ollamas_place_is_a_circle():
    with serve(LOPSIDED, lifespan="off") as url:
        seen = await look(settings(listen=free_port(), upstream=url), DeviceOrder(), PAIR)
    level, text = found(seen, "Ollama")
    assert level == "fail"
    assert "circle" in text
    assert "LOPSIDED_UPSTREAM" in text


@pytest.mark.parametrize(("app", "listener"), [(LOPSIDED, "lopsided"), (OLLAMA, "another program")])
async def test_who_holds_the_proxys_port_is_told_apart(app, listener):
    with serve(app, lifespan="off") as url:
        seen = await look(settings(listen=int(url.rpartition(":")[2]), upstream=f"127.0.0.1:{free_port()}"), DeviceOrder(), PAIR)
    assert seen.listener == listener


@pytest.mark.parametrize(("answer", "answering"), [({"state": "silent"}, False), ({"state": "answering"}, True), (None, None)])
async def test_the_proxy_that_listens_says_whether_the_launcher_asks_it(answer, answering):
    app = json_app({"/lopsided/health": {"name": "lopsided"}, "/lopsided/launcher": answer})
    with serve(app, lifespan="off") as url:
        seen = await look(settings(listen=int(url.rpartition(":")[2]), upstream=f"127.0.0.1:{free_port()}"), DeviceOrder(), PAIR)
    installed = Installation(library=Path("/lib"), state="installed", current=True)
    level, text = found(replace(seen, launcher=installed), "launcher")
    assert (seen.answering, level, "has not asked" in text) == (answering, "ok", answering is False)


async def test_an_ollama_that_is_down_and_gpus_that_do_not_answer_are_findings_not_errors():
    class Broken:
        def rig(self):
            raise GpuError("NVML does not answer: Driver Not Loaded")

    seen = await look(settings(listen=free_port(), upstream=f"127.0.0.1:{free_port()}"), DeviceOrder(), Broken())
    assert found(seen, "Ollama")[0] == "fail"
    assert found(seen, "GPUs") == (
        "fail",
        "NVML does not answer: Driver Not Loaded Until then requests pass unchanged. "
        "A file can describe the cards instead: LOPSIDED_PROFILE (docs/settings.md)",
    )


async def test_something_else_in_ollamas_place_is_said_not_to_be_ollama():
    with serve(json_app({"/api/version": ["no", "version"]}), lifespan="off") as url:
        seen = await look(settings(listen=free_port(), upstream=url), DeviceOrder(), PAIR)
    assert seen.version is None
    assert "does not answer as Ollama does" in found(seen, "Ollama")[1]
    with serve(json_app({}), lifespan="off") as url:
        seen = await look(settings(listen=free_port(), upstream=url), DeviceOrder(), PAIR)
    assert "(it answers /api/version with status 404)" in found(seen, "Ollama")[1]


def test_where_all_is_well_every_line_is_ok():
    assert {finding.level for finding in judge(sight())} == {"ok"}


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("0.32.15", "ok", "llama-server era"),
        ("0.30.0-rc1", "ok", "llama-server era"),
        ("0.24.0", "warn", "runner era"),
        ("0.5.7", "warn", "Update Ollama"),
        ("0.0.0", "warn", "build of your own"),
        ("main", "warn", "build of your own"),
    ],
)
def test_the_version_tells_what_can_be_done(version, level, said):
    got, text = found(sight(version=version), "Ollama")
    assert got == level
    assert said in text


def test_a_guessed_device_order_is_a_warning_that_names_both_remedies():
    level, text = found(sight(order=DeviceOrder()), "device order")
    assert level == "warn"
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in text
    assert "LOPSIDED_DEVICE_ORDER" in text
    assert found(sight(order=DeviceOrder(names=("RTX 5090",))), "device order")[0] == "ok"


def test_the_order_of_a_profile_is_no_guess(tmp_path):
    (profile := tmp_path / "rig.toml").write_text("")
    seen = sight(settings=load_settings(profile=profile), order=DeviceOrder(names=("another",)))
    assert found(seen, "device order") == ("ok", f"as {profile} gives it ")


def test_spread_is_a_warning_and_shared_settings_are_named_with_their_values():
    told = sight(settings=load_settings(sched_spread="1", num_parallel=4, kv_cache_type="q8_0"))
    assert found(told, "spread")[0] == "warn"
    assert "OLLAMA_NUM_PARALLEL=4, OLLAMA_KV_CACHE_TYPE=q8_0, OLLAMA_SCHED_SPREAD=1" in found(told, "settings")[1]
    assert "OLLAMA_NUM_PARALLEL=0" in found(sight(settings=load_settings(num_parallel=0)), "settings")[1]
    assert re.search("defaults.* OLLAMA_SCHED_SPREAD", found(sight(), "settings")[1])


def test_what_a_card_does_not_tell_is_named():
    gpus = PAIR.rig().gpus
    level, text = found(sight(rig=Rig(gpus=(gpus[0], replace(gpus[1], bandwidth_bytes_per_s=None)))), "GPU 1")
    assert level == "warn"
    assert "unknown: bandwidth_bytes_per_s" in text


def test_one_gpu_leaves_nothing_to_choose_and_equal_ones_little():
    only = Gpu(uuid="a", name="RTX 5090", total_bytes=2**35, free_bytes=2**34)
    assert found(sight(rig=Rig(gpus=(only,))), "GPUs")[0] == "warn"
    assert "alike" in found(sight(rig=Rig(gpus=(only, replace(only, uuid="b")))), "GPUs")[1]


@pytest.mark.parametrize(
    ("state", "current", "level", "says"),
    [
        ("absent", False, "ok", "not installed"),
        ("installed", True, "ok", "in /lib"),
        ("installed", False, "warn", "another version's"),
        ("replaced", False, "warn", "an update of Ollama has put its own llama-server back"),
        ("interrupted", False, "warn", "half installed"),
        ("lost", False, "warn", "no model loads"),
    ],
)
def test_a_launcher_that_an_update_took_away_is_noticed(state, current, level, says):
    """What ``lopsided launcher status`` knows, with what to do; nothing where Ollama's library has no llama-server."""
    launcher = Installation(library=Path("/lib"), state=state, current=current)
    (found,) = [finding for finding in judge(sight(launcher=launcher)) if finding.subject == "launcher"]
    assert (found.level, bool(found.advice)) == (level, not current)
    assert says in found.text
    none = replace(launcher, state="none")
    assert not [finding for finding in judge(sight(launcher=none)) if finding.subject == "launcher"]
