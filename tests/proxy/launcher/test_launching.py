"""The real launcher under bash before the real proxy before a simulated Ollama, with a stand-in for the real llama-server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from planner.placement import Placement, solo
from planner.request import MARGIN_BYTES
from proxy.config.settings import load_settings
from proxy.gpus.static import StaticSource
from proxy.launcher.launch import BODY_LIMIT_BYTES
from proxy.launcher.launches import Launches
from proxy.launcher.launching import ANSWER_S
from proxy.placing import placement, shrunk
from proxy.plans.loading import WIDER_MARGIN_BYTES
from proxy.simulator import Simulator, create_app, demo_models
from proxy.wire.access import LAUNCH_PATH, bears_token, is_loopback, refuses_own
from tests.gguf_files import gguf
from tests.proxy.planners import make, planner_for
from tests.proxy.upstreams import proxy_before
from tests.servers import serve
from tests.test_llama_server_script import Library, Start, make_library

RIG = StaticSource.from_arguments(["RTX 5090:31500MiB", "RTX 3090:23700MiB"]).rig()
SOLO = ("--device", "CUDA0", "--split-mode", "none", "--main-gpu", "0")
SEEN = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "OLLAMA_SCHED_SPREAD": "1"}
"""What Ollama gives llama-server where the launcher is installed as it should be."""


class Machine:
    """A simulated Ollama, the proxy, and the launcher in a library folder."""

    def __init__(self, simulator: Simulator, ollama: str, url: str, library: Library) -> None:
        self.simulator, self.ollama, self.url, self.library = simulator, ollama, url, library

    def path(self, name: str) -> str:
        model = self.simulator.store.find(name)
        assert model is not None
        return model.blob_path

    def launch(self, name: str, *more: str, context: int = 8192, **environment: str | None) -> Start:
        """Starts llama-server as Ollama would for the model (or the file) ``name``."""
        path = name if name.startswith("/") else self.path(name)
        self.given = ("--model", path, "--port", "40967", "-c", str(context), "-np", "1", "-b", "512", "-ub", "512", *more)
        return self.library.start(*self.given, **{"LOPSIDED_URL": self.url, **SEEN, **environment})

    def appended(self, name: str, *more: str, context: int = 8192, **environment: str | None) -> tuple[str, ...]:
        return self.launch(name, *more, context=context, **environment).appended(self.given)

    def generate(self, name: str, **options: object) -> httpx.Response:
        body = {"model": name, "prompt": "x", "stream": False, "options": {"num_predict": 1, **options}}
        return httpx.post(self.url + "/api/generate", json=body, timeout=10)

    @contextmanager
    def waiting_client(self, name: str, **options: object) -> Iterator[None]:
        """A client whose request has reached Ollama, and who leaves at the end."""
        body = json.dumps({"model": name, "prompt": "x", "options": options}).encode()
        before = len(self.simulator.requests)
        url = httpx.URL(self.url)
        with socket.create_connection((url.host, url.port), timeout=10) as client:
            client.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            wait_until(lambda: any(r.path == "/api/generate" for r in list(self.simulator.requests)[before:]))
            yield

    def placed(self) -> dict[str, object]:
        """The options of the last request that reached Ollama."""
        request = next(request for request in reversed(self.simulator.requests) if request.path == "/api/generate")
        return json.loads(request.body)["options"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def machine(tmp_path):
    with make_machine(tmp_path) as made:
        yield made


@contextmanager
def make_machine(tmp_path: Path, **proxy: Any) -> Iterator[Machine]:
    simulator = Simulator(RIG, demo_models())
    settings = {"source": simulator, **proxy}
    with serve(create_app(simulator)) as ollama, proxy_before(ollama, **settings) as url:
        yield Machine(simulator, ollama, url, make_library(tmp_path / "ollama"))


def test_a_model_that_fits_a_card_goes_there_though_ollama_would_spread_it(machine):
    assert machine.appended("qwen2.5:32b", context=4096)[:6] == SOLO


def test_a_model_that_fits_none_is_split_exactly(machine):
    appended = machine.appended("llama3.3:70b", context=4096)
    assert appended[2:5] == ("--split-mode", "layer", "--tensor-split")
    shares = dict(zip(appended[1].split(","), map(int, appended[5].split(",")), strict=True))
    assert shares["CUDA0"] > shares["CUDA1"] > 0
    assert appended[6:10] == ("-ngl", str(sum(shares.values())), "--fit", "off")


def test_the_card_that_ollama_left_visible_is_the_only_one_that_is_planned_for(machine):
    # without SPREAD Ollama hides the others, and CUDA0 is then the 3090
    start = machine.launch("phi4:14b", context=4096, CUDA_VISIBLE_DEVICES="1", OLLAMA_SCHED_SPREAD=None)
    assert start.appended(machine.given) == ()
    assert "Ollama's own arguments" in start.said


def test_main_gpu_leaves_that_one_card(machine):
    appended = machine.appended("phi4:14b", "--split-mode", "none", "--main-gpu", "1", context=4096)
    assert appended == ()


@pytest.mark.parametrize(
    ("more", "environment"), [(("-ngl", "20"), {}), ((), {"LLAMA_ARG_TENSOR_SPLIT": "1,1"}), ((), {"CUDA_VISIBLE_DEVICES": ""})]
)
def test_a_wish_and_a_load_without_gpus_are_left_alone(machine, more, environment):
    assert machine.appended("qwen2.5:32b", *more, context=4096, **environment) == ()


def test_devices_are_listed_where_the_proxy_has_no_gpus_and_only_then(tmp_path):
    with make_machine(tmp_path, source=None) as machine:
        lines = ("Vulkan0: RTX 3090 (24259 MiB, 23700 MiB free)", "Vulkan1: RTX 5090 (32606 MiB, 31500 MiB free)")
        (machine.library.path / "devices").write_text("".join(f"  {line}\n" for line in lines))
        appended = machine.appended("qwen2.5:32b", context=4096, CUDA_VISIBLE_DEVICES=None)
        assert appended[:2] == ("--device", "Vulkan1")
        assert machine.library.listed() == 1


def test_a_batch_smaller_than_ollamas_own_is_a_clients(machine):
    # shows: a client that saves memory with num_batch; Ollama itself takes 512 at the least here
    assert "-b" not in machine.appended("llama3.3:70b", "-b", "256", "-ub", "256", context=4096)


def test_a_plan_equal_to_stock_is_said_where_ollama_would_spread(tmp_path):
    with make_machine(tmp_path, planner=planner_for(lambda p: solo(0, n_gpus=2, n_layers=p.n_layers))) as machine:
        assert machine.appended("phi4:14b", context=4096) == SOLO


def test_a_load_that_fails_gets_the_wider_plan_and_then_unspread_stock(tmp_path):
    margins = []

    def planner(profile, rig, request):
        margins.append(request.margin_bytes)
        layers = profile.n_layers // 2 + len(margins)
        split = Placement(layers=(layers, profile.n_layers - layers), order=(1, 0), output_gpu=0)
        return make(profile, rig, request, split, solo(0, n_gpus=2, n_layers=profile.n_layers))

    with make_machine(tmp_path, planner=planner) as machine:
        first = machine.appended("phi4:14b", context=8192)
        second = machine.appended("phi4:14b", context=4096)  # Ollama's own retry asks for less
        assert first[:2] == second[:2] == ("--device", "CUDA1,CUDA0")
        assert first != second
        assert machine.appended("phi4:14b", context=2048) == SOLO
        assert margins[:2] == [MARGIN_BYTES, WIDER_MARGIN_BYTES]


def test_the_same_answer_is_not_tried_again_once_it_has_failed(tmp_path):
    def planner(profile, rig, request):
        split = Placement(layers=(profile.n_layers - 5, 5), order=(1, 0), output_gpu=0)
        return make(profile, rig, request, split, solo(0, n_gpus=2, n_layers=profile.n_layers))

    with make_machine(tmp_path, planner=planner) as machine:
        for _ in range(2):  # the second time it may be that the client had left
            assert machine.appended("phi4:14b")[:2] == ("--device", "CUDA1,CUDA0")
        assert machine.appended("phi4:14b") == SOLO


def test_a_load_that_its_client_did_not_wait_for_has_not_failed(tmp_path):
    def planner(profile, rig, request):
        split = Placement(layers=(profile.n_layers - 5, 5), order=(1, 0), output_gpu=0)
        return make(profile, rig, request, split, solo(0, n_gpus=2, n_layers=profile.n_layers))

    with make_machine(tmp_path, planner=planner) as machine:
        machine.launch("llama3.1:8b")  # from here on the launcher is known to answer
        machine.simulator.scheduler.time_scale = 1.0  # a load takes its seconds
        for left in range(1, 4):
            with machine.waiting_client("phi4:14b", num_ctx=8192):
                assert machine.appended("phi4:14b")[:2] == ("--device", "CUDA1,CUDA0")
            wait_until(lambda left=left: machine.simulator.cancelled == left)


def test_a_model_that_was_loaded_meanwhile_has_not_failed(machine):
    first = machine.appended("llama3.3:70b", context=4096)
    machine.generate("llama3.3:70b", num_ctx=4096).raise_for_status()
    deadline = time.monotonic() + 5
    while machine.appended("llama3.3:70b", context=4096) == first:  # the simulated cards are full now
        assert time.monotonic() < deadline
    assert "wider" not in machine.launch("llama3.3:70b", context=4096).said


def test_a_file_that_can_be_read_here_is_planned_by_its_own_header(tmp_path):
    seen = []

    def planner(profile, rig, request):
        seen.append((profile.n_layers, [gpu.free_bytes for gpu in rig.gpus]))
        first = solo(0, n_gpus=2, n_layers=profile.n_layers)
        return make(profile, rig, request, first, first)

    with make_machine(tmp_path, planner=planner) as machine:
        blob, projector = tmp_path / ("sha256-" + "ab" * 32), tmp_path / "projector"
        blob.write_bytes(gguf())
        projector.write_bytes(bytes(5000))
        assert machine.appended(str(blob), "--mmproj", str(projector), context=2048)[:6] == SOLO
        assert seen == [(2, [gpu.free_bytes - 5000 for gpu in RIG.gpus])]
        assert not [request for request in machine.simulator.requests if request.path == "/api/show"]


def test_a_plan_that_takes_long_is_stock_now_and_kept_for_the_next_launch(tmp_path):
    calls = []

    def planner(profile, rig, request):
        calls.append(profile.name)
        if len(calls) == 1:
            time.sleep(ANSWER_S + 0.3)
        return make(
            profile, rig, request, solo(1, n_gpus=2, n_layers=profile.n_layers), solo(0, n_gpus=2, n_layers=profile.n_layers)
        )

    with make_machine(tmp_path, planner=planner) as machine:
        start = machine.launch("phi4:14b", context=4096)
        assert start.appended(machine.given) == ()
        time.sleep(0.5)
        assert machine.appended("phi4:14b", context=4096)[:2] == ("--device", "CUDA1")
        assert len(calls) == 1


@pytest.mark.parametrize(
    "body",
    [b"", b"\n--model\n", b"\xff" * 9, b"CUDA_VISIBLE_DEVICES=0\n\n--model\n/x\n-c\n4096\n", b"x" * (BODY_LIMIT_BYTES + 1)],
    ids=range(5),
)
def test_garbage_is_no_error(machine, body):
    assert httpx.post(machine.url + LAUNCH_PATH, content=body, timeout=10).status_code == 204


def test_a_planner_that_breaks_is_no_error(tmp_path):
    def planner(profile, rig, request):
        raise RuntimeError("broken")

    with make_machine(tmp_path, planner=planner) as machine:
        for _ in range(2):
            assert machine.appended("phi4:14b", context=4096) == ()


def test_while_the_launcher_answers_requests_get_no_placement_options(machine):
    assert machine.generate("qwen2.5:32b", num_ctx=32768).headers["x-lopsided-plan"].startswith("solo CUDA0; auto")
    assert machine.placed()["main_gpu"] == 0
    machine.launch("qwen2.5:32b", context=32768)
    machine.generate("qwen2.5:32b", num_ctx=32768)
    assert machine.placed()["main_gpu"] == 0, "what is in force stays, or Ollama would load it again"
    answer = machine.generate("phi4:14b", num_ctx=4096)
    assert answer.headers["x-lopsided-plan"].endswith("; auto; by the launcher")
    assert not {"main_gpu", "num_gpu", "tensor_split"} & machine.placed().keys()
    # the simulated Ollama starts no launcher, so this load went past it: options are back, and say what
    # stock would do unspread as well, since this Ollama was told to spread for the launcher's sake
    for name in ("qwen2.5:32b", "phi4:14b"):
        httpx.post(machine.url + "/api/generate", json={"model": name, "keep_alive": 0}, timeout=10).raise_for_status()
    answer = machine.generate("llama3.1:8b", num_ctx=4096)
    assert answer.headers["x-lopsided-plan"] == "solo CUDA0; auto"
    assert machine.placed()["main_gpu"] == 0


def test_where_the_launcher_places_everything_a_model_on_v1_is_no_exception(machine):
    body = {"model": "phi4:14b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    httpx.post(machine.url + "/v1/chat/completions", json=body, timeout=10).raise_for_status()
    machine.launch("phi4:14b", context=4096)
    assert machine.generate("phi4:14b", num_ctx=4096).headers["x-lopsided-plan"].endswith("; by the launcher")


def test_where_ollama_does_not_spread_a_solo_plan_still_goes_out_as_main_gpu(machine):
    machine.launch("qwen2.5:32b", context=32768, OLLAMA_SCHED_SPREAD=None)
    assert machine.generate("qwen2.5:32b", num_ctx=32768).headers["x-lopsided-plan"].startswith("solo CUDA0; auto")
    assert machine.placed()["main_gpu"] == 0


def test_a_context_that_a_failed_load_cost_comes_back_once_a_plan_holds_it(machine, monkeypatch, caplog):
    # shows: Ollama tried again with a smaller context by itself; idle later, with room again, the model is loaded anew, once
    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    scheduler, start, fails = machine.simulator.scheduler, machine.simulator.scheduler._start, True

    async def launched(model, load):
        context = load.settings.num_ctx
        arguments = ["--model", model.blob_path, "-c", str(context), "-b", "512", "-ub", "512"]
        body = "\n".join([*(f"{name}={value}" for name, value in SEEN.items()), "", *arguments, ""])
        async with httpx.AsyncClient() as client:
            await client.post(machine.url + LAUNCH_PATH, content=body)
        if fails and context > 4096:
            return "llama-server process has terminated: exit status 1: cudaMalloc failed: out of memory", 0.0
        return await start(model, load)

    monkeypatch.setattr(scheduler, "_start", launched)

    def context() -> int:
        machine.generate("phi4:14b").raise_for_status()
        (model,) = httpx.get(machine.ollama + "/api/ps", timeout=10).json()["models"]
        return model["context_length"]

    assert context() == 4096
    fails = False
    assert context() == 4096, "not at once"
    assert "loaded with 4096 tokens of context, not 16384" in caplog.text
    assert httpx.get(machine.url + "/lopsided/models", timeout=10).json()["models"][0]["context_note"]
    monkeypatch.setattr(shrunk, "REPLAN_S", 0.0)
    assert context() == 16384
    starts = scheduler.count("launch")
    assert context() == 16384
    assert scheduler.count("launch") == starts
    assert "; by the launcher" in machine.generate("phi4:14b").headers["x-lopsided-plan"]


def test_a_context_that_cannot_come_back_is_tried_for_once(machine, monkeypatch):
    monkeypatch.setattr(placement, "LOOK_S", 0.0)
    monkeypatch.setattr(shrunk, "REPLAN_S", 0.0)
    real = Launches.level
    monkeypatch.setattr(Launches, "level", lambda self, blob: max(real(self, blob), 1))  # as after a failed load
    machine.launch("phi4:14b", context=16384)
    monkeypatch.setattr(machine.simulator.scheduler, "_start", smaller(machine.simulator.scheduler._start))
    for _ in range(4):
        machine.generate("phi4:14b").raise_for_status()
        machine.launch("phi4:14b", context=4096)  # the launcher goes on asking
    assert machine.simulator.scheduler.count("launch") == 4  # two loads, and of each Ollama's second try


def smaller(start):
    """A start that fails with the whole context, whatever is free."""

    async def started(model, load):
        if load.settings.num_ctx > 4096:
            return "cudaMalloc failed: out of memory", 0.0
        return await start(model, load)

    return started


def test_what_the_launcher_placed_is_shown_whoever_the_client_was(machine):
    def shown(path: str) -> Any:
        return httpx.get(machine.url + path, timeout=10).raise_for_status().json()

    assert shown("/lopsided/launcher")["delivery"] == "options"
    for name in ("phi4:14b", "llama3.1:8b"):
        body = {"model": name, "prompt": "x", "stream": False, "options": {"num_ctx": 4096, "num_predict": 1}}
        httpx.post(machine.ollama + "/api/generate", json=body, timeout=10).raise_for_status()
    machine.launch("phi4:14b", context=4096, CUDA_VISIBLE_DEVICES="1")
    assert shown("/lopsided/launcher")["state"] == "answering"
    assert shown("/lopsided/launcher")["delivery"] == "launcher"
    rows = {row["model"].rpartition("/")[2]: row for row in shown("/lopsided/models")["models"]}
    assert all(row["loaded"] and row["actual_vram_bytes"] > 0 for row in rows.values())
    assert rows["llama3.1:8b"]["placement"] == "loaded past lopsided"
    assert rows["llama3.1:8b"]["predicted_bytes"] == []
    assert rows["phi4:14b"]["placement"].endswith("; by the launcher")
    # the card is the one that the launch left visible, by its place in the list of devices
    assert [held > 0 for held in rows["phi4:14b"]["predicted_bytes"]] == [False, True]


@pytest.mark.parametrize(
    ("address", "own"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("172.17.0.1", False), ("", False)],
)
def test_only_loopback_addresses_need_no_token(address, own):
    assert is_loopback(address) is own


def test_free_memory_is_as_the_cards_have_it_at_the_launch(machine):
    machine.simulator.gpus.occupy(0, RIG.gpus[0].free_bytes)
    assert machine.appended("phi4:14b", context=4096)[:2] == ("--device", "CUDA1")


def test_a_profile_does_not_say_what_is_free_at_the_launch(tmp_path):
    """It describes cards and does not watch them: what other models hold, only the list tells. It may hold some back itself."""
    with make_machine(tmp_path, source=StaticSource(RIG)) as machine:
        lines = ("CUDA0: RTX 5090 (32606 MiB, 0 MiB free)", "CUDA1: RTX 3090 (24259 MiB, 24000 MiB free)")
        (machine.library.path / "devices").write_text("".join(f"  {line}\n" for line in lines))
        assert machine.appended("phi4:14b", context=4096)[:2] == ("--device", "CUDA1")


@pytest.mark.parametrize("visible", ["GPU-b,GPU-a", None])
def test_what_a_profile_holds_back_counts_where_ollama_shows_cards_by_uuids(tmp_path, caplog, visible):
    """Which of them is which only their names tell, and one that it does not describe is said to be none of its cards."""
    held_back = StaticSource.from_profile({"gpu": [{"name": "RTX 5090", "free": "1GiB"}, {"name": "RTX 3090"}]})
    with make_machine(tmp_path, source=held_back) as machine:
        cards = ("3090 (24259 MiB, 24000 MiB free)", "5090 (32606 MiB, 32000 MiB free)", "4060 (8188 MiB, 8000 MiB free)")
        lines = (f"  CUDA{number}: NVIDIA GeForce RTX {card}\n" for number, card in enumerate(cards))
        (machine.library.path / "devices").write_text("".join(lines))
        assert machine.appended("phi4:14b", context=4096, CUDA_VISIBLE_DEVICES=visible)[:2] == ("--device", "CUDA0")
    assert "CUDA2 (NVIDIA GeForce RTX 4060) is none of the profile's cards" in caplog.text
    assert caplog.text.count("none of the profile's cards") == 1


def test_a_launcher_elsewhere_needs_the_token_and_a_right_host_is_not_enough():
    settings = load_settings(host="127.0.0.1:11435", upstream="http://127.0.0.1:1", token="s3cret")

    def refused(path: str, client: tuple[str, int] | None, *headers: tuple[bytes, bytes]) -> bool:
        given = [(b"host", b"localhost"), *headers]
        scope = {"path": path, "method": "POST" if path == LAUNCH_PATH else "GET", "client": client, "headers": given}
        return refuses_own(scope, settings, trusted=bears_token(given, settings)) is not None

    elsewhere = ("172.17.0.1", 4000)
    assert refused(LAUNCH_PATH, elsewhere)
    assert refused(LAUNCH_PATH, None)
    assert refused(LAUNCH_PATH, elsewhere, (b"authorization", b"Bearer wrong"))
    assert not refused(LAUNCH_PATH, elsewhere, (b"authorization", b"Bearer s3cret"))
    assert not refused(LAUNCH_PATH, ("127.0.0.1", 4000))
    assert not refused("/lopsided/health", elsewhere)
