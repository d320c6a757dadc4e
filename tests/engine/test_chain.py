"""The whole chain with a real llama-server: what the plan says is where the layers are, and whatever breaks, tokens come out."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from proxy.launcher.installation import CACHE, install
from proxy.models.gguf import read_profile
from proxy.simulator import build_model
from tests.engine.conftest import FAST, MODEL, PARALLEL, SLOW, Chain, Worker, chain, end
from tests.engine.ollama import Server
from tests.gguf_files import EMBEDDER, EMBEDDER_TENSORS, gguf
from tests.servers import free_port

Machine = Callable[..., AbstractContextManager[Chain]]

CACHE_MIB = 6 * PARALLEL
"""Of one of SmolLM2's 30 layers: 8192 tokens of 3 KV heads of 64 elements, K and V in two bytes each."""

LAYER_MIB = 2.1
"""Weights of a layer; the output matrix, which is the token embedding, has 29 MiB."""

HALF_FITS = "1700MiB", "1400MiB"
"""Free on the fast and the slow GPU: neither holds the model with four caches, both together do."""


@pytest.fixture
def machine(tmp_path: Path, library: Path, smollm2_blobs: Path, workers: tuple[Worker, Worker]) -> Machine:
    return lambda *gpus: chain(tmp_path, library, smollm2_blobs, workers, gpus)


def layers(server: Server) -> dict[str, int]:
    """Repeating layers on each device, by the caches that the server made there."""
    return {device: round(mib / CACHE_MIB) for device, mib in server.mib("KV").items()}


def output_device(server: Server) -> str:
    """Where the output matrix lies: the device whose weights are much more than its layers'."""
    found = layers(server)
    beyond = {device: mib - LAYER_MIB * found.get(device, 0) for device, mib in server.mib("model").items()}
    return max(beyond, key=beyond.__getitem__)


def flag(arguments: tuple[str, ...], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.mark.parametrize("fast_is", ["RPC1", "RPC0"])
def test_layers_go_where_the_plan_says(machine: Machine, fast_is: str) -> None:
    """A split in the devices' order, and in the reversed one where the fast card comes first: it takes the output layer."""
    fast, slow = (f"{name}:{free}" for name, free in zip((FAST, SLOW), HALF_FITS, strict=True))
    slow_is = "RPC0" if fast_is == "RPC1" else "RPC1"
    with machine(*((slow, fast) if fast_is == "RPC1" else (fast, slow))) as it:
        plan = it.placement()
        answer = it.generate(num_ctx=8192)
        assert answer.status_code == 200
        assert len(answer.json()["response"].split()) > 2
        (server,) = it.servers
        assert plan["kind"] == "split"
        assert flag(server.appended, "--device") == f"{slow_is},{fast_is}"
        planned = dict(zip(("RPC0", "RPC1"), plan["layers"], strict=True))
        assert flag(server.appended, "--tensor-split") == f"{planned[slow_is]},{planned[fast_is]}"
        assert layers(server) == {slow_is: planned[slow_is], fast_is: planned[fast_is] - 1}
        assert output_device(server) == fast_is
        assert "offloaded 31/31 layers to GPU" in server.log


def test_what_was_predicted_is_what_was_allocated(machine: Machine) -> None:
    """Weights and caches of each device to 1 MiB; buffers of a CPU worker are not CUDA's, but of the same size."""
    with machine(f"{SLOW}:{HALF_FITS[1]}", f"{FAST}:{HALF_FITS[0]}") as it:
        plan = it.placement()
        it.generate(num_ctx=8192)
        for number, device in enumerate(plan["devices"]):
            for kind, key in (("model", "weights_bytes"), ("KV", "kv_bytes")):
                assert it.servers[-1].mib(kind)[f"RPC{number}"] == pytest.approx(device[key] / 2**20, abs=1)


def test_a_model_that_fits_the_fast_card_is_there_alone(machine: Machine) -> None:
    """Although Ollama was told to spread: by request options, and by the launcher once it has asked."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it:
        for said in ("solo RPC1; auto", "solo RPC1; auto; by the launcher"):
            answer = it.generate(num_ctx=8192)
            assert (answer.status_code, answer.headers["x-lopsided-plan"]) == (200, said)
            assert layers(it.servers[-1]) == {"RPC1": 30}
            it.unload()
            time.sleep(1.1)  # until then the proxy may take the model for loaded
        assert flag(it.servers[-1].appended, "--device") == "RPC1"


def test_clients_that_bypass_the_proxy_get_the_plan_too(machine: Machine) -> None:
    """Straight to Ollama: the launcher asks whoever the client is."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it:
        assert it.generate(to=it.ollama_url, num_ctx=8192).status_code == 200
        assert layers(it.servers[-1]) == {"RPC1": 30}


def test_a_plan_that_does_not_fit_ends_as_stock_would_have_it(machine: Machine) -> None:
    """The fast card has less than it says: a wider plan, then stock's place, all within one request."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it:
        it.generate(to=it.ollama_url)
        time.sleep(0.3)
        it.unload()
        it.workers[1].hold_to(200)
        answer = it.generate()
        assert answer.status_code == 200
        assert answer.json()["response"].strip()
        assert [server.state for server in it.servers][-1] == "ready"
        assert it.servers[1].state == "failed"
        assert layers(it.servers[-1]) == {"RPC0": 30}
        it.unload()
        assert it.generate().status_code == 200  # remembered: no further failure
        assert [server.state for server in it.servers].count("failed") <= 2


def test_a_proxy_that_dies_while_a_launch_waits_leaves_stock(machine: Machine) -> None:
    """Stopped first, so that the launch waits for it, then killed: the load goes on within the launcher's two seconds."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it:
        it.proxy.send_signal(signal.SIGSTOP)
        killer = threading.Timer(1.0, lambda: end(it.proxy))
        killer.start()
        assert it.generate(to=it.ollama_url, num_ctx=8192).status_code == 200
        killer.join()
        (server,) = it.servers
        assert server.appended == ()
        assert sum(layers(server).values()) == 30
        assert server.said


def test_the_last_good_answer_serves_while_the_proxy_is_away(machine: Machine, library: Path) -> None:
    """The same model, arguments and devices, more than two minutes later: the launcher has kept what it was told."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it:
        it.generate(to=it.ollama_url, num_ctx=8192)
        it.unload()
        end(it.proxy)
        (record,) = (library / CACHE).iterdir()
        given, rest = record.read_text().split("\t", 1)
        record.write_text(f"{int(given) - 121}\t{rest}")
        assert it.generate(to=it.ollama_url, num_ctx=8192).status_code == 200
        assert layers(it.servers[-1]) == {"RPC1": 30}


@pytest.mark.parametrize(
    "answer",
    [
        b"--model\n/etc/passwd\n",
        b"--device\n$(touch pwned)\n",
        b"--device\nRPC1`touch pwned`\n",
        b"--port\n1\n",
        b"--device\nRPC1\n--chat-template-file\n/etc/passwd\n",
        b"--device\n" + b"A" * 2**20,
        b"\0\xff\n" * 100,
    ],
    ids=["model", "command", "backticks", "port", "one bad of two", "a megabyte", "no text"],
)
def test_a_rogue_answer_is_ignored(machine: Machine, library: Path, tmp_path: Path, answer: bytes) -> None:
    """Whoever answers in lopsided's place: stock's arguments, one line, words for the client, and nothing is run."""
    with machine(f"{SLOW}:23000MiB", f"{FAST}:9000MiB") as it, rogue(answer) as url:
        install(library, url=url, token=None)
        assert it.generate(to=it.ollama_url, num_ctx=8192).status_code == 200
        (server,) = it.servers
        assert server.appended == ()
        assert sum(layers(server).values()) == 30
        assert len(server.said) == 1
        assert not list(tmp_path.rglob("pwned"))
        assert not Path("pwned").exists()


def test_a_long_text_is_embedded_by_a_model_that_the_launcher_placed(
    tmp_path: Path, library: Path, workers: tuple[Worker, Worker]
) -> None:
    """On the slow card, and with the batch that Ollama gives it: llama-server takes no text that is longer."""
    file = tmp_path / "embedder.gguf"
    file.write_bytes(gguf(EMBEDDER, EMBEDDER_TENSORS))
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    file.rename(blobs / build_model(MODEL, read_profile(file)).blob.replace(":", "-"))
    with chain(tmp_path, library, blobs, workers, (f"{SLOW}:9000MiB", f"{FAST}:9000MiB")) as it:
        for _ in range(2):  # the second time the launcher is known to answer
            httpx.post(it.url + "/api/embed", json={"model": MODEL, "input": "word"}, timeout=60)
            server = it.servers[-1]
            answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/embeddings", json={"input": "word " * 1500}, timeout=60)
            assert (answer.status_code, list(server.mib("model"))) == (200, ["RPC0"]), answer.text
            it.unload()
            time.sleep(1.1)
        assert flag(server.appended, "--device") == "RPC0"


@contextmanager
def rogue(answer: bytes) -> Iterator[str]:
    """A server that gives every request this ``answer``."""
    port = free_port()
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(5)
                try:
                    client.recv(65536)
                    client.sendall(
                        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer
                    )
                    time.sleep(0.05)
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        listener.close()
