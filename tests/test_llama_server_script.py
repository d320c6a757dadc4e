"""The launcher under a real bash, before a real server: whatever that answers, llama-server starts, and soon."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.responses import Response

from proxy.launcher.launch import BODY_LIMIT_BYTES, answer, ask_for_devices, parse_launch
from tests.servers import free_port, serve

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docker" / "llama-server"
PROMISE_S = 2.0
"""What the launcher may take in all, whatever happens."""

BUSY_S = 3.0
"""On top of that: a test machine with other things to do, and the start of the Python that stands for llama-server."""

RECORDED = "/root/.ollama/models/blobs/sha256-b18c850a1260bb5346e5aadd293b64b65983b00da61d0335982049075fdf910c"
LOAD = (
    *("--model", RECORDED, "--port", "40967", "--host", "127.0.0.1", "--no-webui", "--offline", "-c", "4096", "-np", "1"),
    *("--flash-attn", "auto", "-b", "512", "-ub", "512", "--context-shift", "--keep", "4"),
)
SPLIT = ("--device", "CUDA1,CUDA0", "--split-mode", "layer", "--tensor-split", "19,46", "-ngl", "65", "--fit", "off")

STOCK = f"""#!{sys.executable} -IS
import json, os, signal, sys
here = os.path.dirname(os.path.abspath(sys.argv[0]))
if "--list-devices" in sys.argv:
    open(os.path.join(here, "listed"), "a").write("once\\n")
    print(open(os.path.join(here, "devices")).read(), end="")
    raise SystemExit
try:
    child = os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    child = None
json.dump({{
    "arguments": sys.argv[1:],
    "environment": dict(os.environ),
    "pid": os.getpid(),
    "child": child,
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)),
    "pipe_ignored": signal.getsignal(signal.SIGPIPE) is None,
}}, open(os.path.join(here, "started"), "w"))
"""


@dataclass
class Start:
    """What came of one start: what the real llama-server was given, the launcher's words, and how long it took."""

    arguments: tuple[str, ...]
    environment: dict[str, str]
    pid: int
    launcher_pid: int
    child: list[int] | None
    files: list[int]
    said: str
    seconds: float

    def appended(self, given: tuple[str, ...] = LOAD) -> tuple[str, ...]:
        """What follows the arguments that were given, which must stand there unchanged."""
        assert self.arguments[: len(given)] == given
        return self.arguments[len(given) :]


@dataclass
class Library:
    """Ollama's library folder with the launcher in llama-server's place."""

    path: Path

    def start(self, *arguments: str, shell: tuple[str, ...] = (), **environment: str | None) -> Start:
        """Runs the launcher as Ollama would. A variable that is ``None`` is not set."""
        self.started.unlink(missing_ok=True)
        variables = {
            "CUDA_VISIBLE_DEVICES": "0,1",
            "LD_LIBRARY_PATH": "/usr/lib/ollama",
            "PATH": os.environ["PATH"],
            **environment,
        }
        begin = time.monotonic()
        with subprocess.Popen(
            [*shell, self.path / "llama-server", *(os.fsencode(argument) for argument in arguments or LOAD)],
            env={name: value for name, value in variables.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            _, said = process.communicate(timeout=30)
        seconds = time.monotonic() - begin
        assert process.returncode == 0, said
        record = json.loads(self.started.read_text())
        return Start(
            arguments=tuple(record["arguments"]),
            environment=record["environment"],
            pid=record["pid"],
            launcher_pid=process.pid,
            child=record["child"],
            files=record["files"],
            said=said.decode(),
            seconds=seconds,
        )

    @property
    def started(self) -> Path:
        return self.path / "started"

    @property
    def cache(self) -> Path:
        return self.path / "llama-server.cache"

    def wait(self) -> None:
        """As if two minutes went by: kept answers are then as good as ever."""
        for record in self.cache.iterdir():
            lines = record.read_text().splitlines(keepends=True)
            record.write_text("".join(f"{int(line[:10]) - 121}{line[10:]}" for line in lines))

    def listed(self) -> int:
        """How often ``--list-devices`` was run."""
        log = self.path / "listed"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def library(tmp_path) -> Library:
    return make_library(tmp_path / "ollama")


def make_library(path: Path) -> Library:
    path.mkdir()
    shutil.copy2(SCRIPT, path / "llama-server")
    (path / "llama-server.stock").write_text(STOCK)
    (path / "llama-server.stock").chmod(0o755)
    (path / "llama-server.cache").mkdir()
    (path / "devices").write_text("Available devices:\n")
    return Library(path)


Answering = Callable[[socket.socket], None]


@dataclass
class Server:
    """A server that does to each connection what ``answering`` does, after having read the whole request."""

    url: str
    answering: Answering
    requests: list[bytes] = field(default_factory=list)

    def bodies(self) -> list[bytes]:
        return [request.partition(b"\r\n\r\n")[2] for request in self.requests]


def http(status: int, body: bytes = b"", *, headers: str | None = None) -> Answering:
    """A whole answer at once, with its length unless ``headers`` say otherwise."""
    extra = f"Content-Length: {len(body)}\r\n" if headers is None else headers
    text = f"HTTP/1.1 {status} Some Reason\r\nServer: test\r\n{extra}\r\n".encode() + body
    return raw(text)


def raw(data: bytes) -> Answering:
    return lambda connection: connection.sendall(data)


def trickle(data: bytes) -> Answering:
    """A byte every tenth of a second."""

    def send(connection: socket.socket) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    return send


def silent(connection: socket.socket) -> None:
    """Nothing at all, until the other side has gone."""
    connection.settimeout(10)
    connection.recv(1)


def plan(arguments: tuple[str, ...]) -> Answering:
    return http(*answer(arguments))


@contextmanager
def serving(answering: Answering, *, family: socket.AddressFamily = socket.AF_INET) -> Iterator[Server]:
    with socket.socket(family) as listener:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        host = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
        server = Server(f"http://{host}:{listener.getsockname()[1]}", answering)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        server.requests.append(_read_request(connection))
                        server.answering(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def _read_request(connection: socket.socket) -> bytes:
    connection.settimeout(10)
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += _received(connection)
    assert len(body) == length
    return head + b"\r\n\r\n" + body


def _received(connection: socket.socket) -> bytes:
    if not (data := connection.recv(65536)):
        raise ConnectionError("the launcher has gone before its request was whole")
    return data


# When all is well


def test_the_answer_is_appended_to_ollamas_own_arguments(library):
    with serving(plan(SPLIT)) as server:
        start = library.start(LOPSIDED_URL=server.url)
    assert start.appended() == SPLIT
    assert start.said == "lopsided: " + " ".join(SPLIT) + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "ROCm0", "--split-mode", "none", "--main-gpu", "0"),
        (
            "--device",
            "CUDA0",
            "--split-mode",
            "none",
            "--main-gpu",
            "0",
            "-ngl",
            "33",
            "--fit",
            "on",
            "-b",
            "2048",
            "-ub",
            "1024",
        ),
        ("--device", "CUDA0", "--n-cpu-moe", "12"),
        ("--device", "CUDA0", "-ot", r"blk\.(1|2|30)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"),
    ],
)
def test_everything_that_a_plan_can_say_passes(library, arguments):
    (library.path / "devices").write_text("  ROCm0: x (1 MiB, 1 MiB free)\n  CUDA0: x (1 MiB, 1 MiB free)\n")
    with serving_devices(plan(arguments)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == arguments


def test_the_real_server_takes_the_launchers_process_and_inherits_nothing_of_it(library):
    with serving(plan(SPLIT)) as server:
        start = library.start(LOPSIDED_URL=server.url, LC_ALL="C.UTF-8", OLLAMA_X="a b\nc")
    assert start.pid == start.launcher_pid
    assert start.child is None
    assert start.files == [0, 1, 2]
    added = start.environment.keys() - {"_", "SHLVL", "PWD"}
    assert added == {"CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "PATH", "LOPSIDED_URL", "LC_ALL", "OLLAMA_X"}
    assert (start.environment["LC_ALL"], start.environment["OLLAMA_X"]) == ("C.UTF-8", "a b\nc")
    assert start.environment["LD_LIBRARY_PATH"] == "/usr/lib/ollama"


def test_the_request_says_what_is_visible_and_what_ollama_asks_for(library):
    with serving(http(204)) as server:
        start = library.start(
            LOPSIDED_URL=f"{server.url}/behind/a/path/",
            LOPSIDED_TOKEN="s3cret",
            CUDA_DEVICE_ORDER="PCI_BUS_ID",
            OLLAMA_SCHED_SPREAD="1",
            SECRET="not theirs",
        )
    assert start.appended() == ()
    (request,) = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /behind/a/path/lopsided/launch HTTP/1.0"
    assert b"Authorization: Bearer s3cret" in lines
    assert b"Host: " + server.url.removeprefix("http://").encode() in lines
    launch = parse_launch(body)
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "OLLAMA_SCHED_SPREAD": "1"}
    assert launch.model_path == RECORDED
    assert (launch.settings.num_ctx, launch.settings.batch, launch.spread) == (4096, 512, True)
    assert body.partition(b"\n\n")[2].decode().splitlines() == list(LOAD)


@pytest.mark.parametrize(("given", "appended"), [(answer(SPLIT), SPLIT), (answer(None), ())])
def test_the_server_that_lopsided_runs_on_is_understood(library, given, appended):
    """uvicorn answers HTTP/1.0 in its own way, and closes when it likes."""
    status, body = given

    async def app(scope, receive, send):
        await receive()
        await Response(body or None, status, media_type="text/plain")(scope, receive, send)

    with serve(app, lifespan="off") as url:
        start = library.start(LOPSIDED_URL=url)
    assert start.appended() == appended
    assert len(start.said.splitlines()) == 1
    assert "; " not in start.said


def test_the_answer_stock_leaves_ollamas_arguments(library):
    with serving(http(204)) as server:
        start = library.start(LOPSIDED_URL=server.url)
    assert start.appended() == ()
    assert start.said == "lopsided: Ollama's own arguments\n"


@given(arguments=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arguments_of_any_kind_pass_unchanged_and_arrive_as_they_are(tmp_path, arguments):
    path = tmp_path / "ollama"
    library = Library(path) if path.exists() else make_library(path)
    load = ("--model", "/a b/\n%0A\t*", *arguments, "\udcff", "", "-c", "8")
    with serving(plan(SPLIT)) as server:
        assert library.start(*load, LOPSIDED_URL=server.url, LC_ALL="C.UTF-8").appended(load) == SPLIT
        (body,) = server.bodies()
    lines = body.partition(b"\n\n")[2].removesuffix(b"\n").split(b"\n")
    assert [unquote_to_bytes(line) for line in lines] == [os.fsencode(argument) for argument in load]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "62548", "--host", "127.0.0.1", "--no-webui", "--offline", "--verbose"),
        ("--version",),
    ],
)
def test_starts_without_a_model_pass_untouched_and_unasked(library, arguments):
    with serving(plan(SPLIT)) as server:
        start = library.start(*arguments, LOPSIDED_URL=server.url)
    assert (start.arguments, start.said, server.requests) == (arguments, "", [])


def test_url_and_token_come_from_the_file_beside_it_where_the_environment_has_none(library):
    with serving(plan(SPLIT)) as server:
        (library.path / "llama-server.lopsided").write_text(f"# written\nLOPSIDED_URL={server.url}\nLOPSIDED_TOKEN=from-file")
        assert library.start().appended() == SPLIT
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    assert b"Authorization: Bearer from-file\r\n" in server.requests[0]
    assert b"Authorization" not in server.requests[1]


def test_an_ipv6_address_is_asked(library):
    with serving(plan(SPLIT), family=socket.AF_INET6) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    assert b"Host: [::1]:" in server.requests[0]


@pytest.mark.parametrize("beside", ["the link", "its target"])
def test_it_works_through_a_symbolic_link(library, tmp_path, beside):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = ("llama-server", "llama-server.stock") if beside == "its target" else ("llama-server",)
    for name in moved:
        (library.path / name).rename(elsewhere / name)
    (library.path / "llama-server").symlink_to("../elsewhere/llama-server")
    record = (elsewhere if beside == "its target" else library.path) / "started"
    with serving(plan(SPLIT)) as server:
        command = [library.path / "llama-server", *LOAD]
        subprocess.run(
            command, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "LOPSIDED_URL": server.url}, check=True, timeout=10
        )
    assert json.loads(record.read_text())["arguments"] == [*LOAD, *SPLIT]


def test_without_the_real_server_it_says_so(library):
    (library.path / "llama-server.stock").unlink()
    ended = subprocess.run([library.path / "llama-server", *LOAD], capture_output=True, text=True, check=False, timeout=10)
    assert ended.returncode == 127
    assert "llama-server.stock is missing" in ended.stderr


@pytest.mark.parametrize("how", ["copy", "link", "hard link"])
def test_it_never_starts_itself(library, how):
    (library.path / "llama-server.stock").unlink()
    if how == "copy":
        shutil.copy2(SCRIPT, library.path / "llama-server.stock")
    elif how == "link":
        (library.path / "llama-server.stock").symlink_to("llama-server")
    else:
        (library.path / "llama-server.stock").hardlink_to(library.path / "llama-server")
    ended = subprocess.run([library.path / "llama-server", "--version"], capture_output=True, text=True, timeout=10, check=False)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (127, "", 1)


def test_no_variable_is_used_that_is_not_set(library):
    with serving(plan(SPLIT)) as server:
        first = library.start(LOPSIDED_URL=server.url, shell=("bash", "-u"), CUDA_VISIBLE_DEVICES="0,1")
        second = library.start(LOPSIDED_URL=None, shell=("bash", "-u"), CUDA_VISIBLE_DEVICES=None)
    library.wait()
    kept = library.start(LOPSIDED_URL=server.url, shell=("bash", "-u"))
    assert (first.appended(), second.appended(), kept.appended()) == (SPLIT, (), SPLIT)
    assert [len(start.said.splitlines()) for start in (first, second, kept)] == [1, 1, 1]


# Devices that only llama-server can name


@contextmanager
def serving_devices(then: Answering) -> Iterator[Server]:
    with serving(silent) as server:
        server.answering = lambda connection: (then if b"\nDEVICES=" in server.requests[-1] else http(*ask_for_devices()))(
            connection
        )
        yield server


ROCM_SPLIT = ("--device", "ROCm0,RPC0", "--split-mode", "layer", "--tensor-split", "1,2", "-ngl", "3", "--fit", "off")
ROCM_LIST = (
    "Available devices:\n  RPC0: 10.0.0.7:50052 (24259 MiB, 23700 MiB free)\n  ROCm0: AMD X (Y) (16368 MiB, 16000 MiB free)\n"
)


def test_devices_are_listed_and_posted_when_they_are_needed(library):
    (library.path / "devices").write_text(ROCM_LIST)
    with serving_devices(plan(ROCM_SPLIT)) as server:
        start = library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES=None)
    assert start.appended() == ROCM_SPLIT
    assert (len(server.requests), library.listed()) == (2, 1)
    assert [device.name for device in parse_launch(server.bodies()[1]).devices] == ["RPC0", "ROCm0"]
    assert start.child is None


def test_a_device_that_is_not_in_the_list_is_refused(library):
    (library.path / "devices").write_text("  ROCm0: AMD X (16368 MiB, 16000 MiB free)\n")
    with serving_devices(plan(ROCM_SPLIT)) as server:
        start = library.start(LOPSIDED_URL=server.url)
    assert start.appended() == ()
    assert "RPC0, which is not one of the devices" in start.said


def test_asking_for_the_devices_again_is_a_fault(library):
    (library.path / "devices").write_text(ROCM_LIST)
    with serving(http(*ask_for_devices())) as server:
        start = library.start(LOPSIDED_URL=server.url)
    assert (start.appended(), len(server.requests), library.listed()) == ((), 2, 1)
    assert len(start.said.splitlines()) == 1


def test_a_slow_list_does_not_count_against_the_limit(library):
    stock = library.path / "llama-server.stock"
    stock.write_text(
        stock.read_text().replace("    raise SystemExit\n", "    import time\n    time.sleep(2.2)\n    raise SystemExit\n")
    )
    (library.path / "devices").write_text(ROCM_LIST)
    with serving_devices(plan(ROCM_SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == ROCM_SPLIT


@pytest.mark.parametrize(
    ("listing", "why"), [("time.sleep(60)", "did not list the devices within 1 s"), ("print('x' * 10**5)", "lists no devices")]
)
def test_a_list_that_hangs_or_says_nothing_ends_in_the_last_good_answer_and_is_said(library, listing, why):
    with serving(plan(SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    library.wait()
    launcher, stock = library.path / "llama-server", library.path / "llama-server.stock"
    launcher.write_text(launcher.read_text().replace("LIST_LIMIT_S=10 ", "LIST_LIMIT_S=1 "))
    stock.write_text(stock.read_text().replace("    print(open(os", f"    import time; {listing}\n    print(open(os"))
    (library.path / "devices").write_text("")
    with serving(http(*ask_for_devices())) as server:
        start = library.start(LOPSIDED_URL=server.url)
    assert (start.appended(), len(server.requests), library.listed()) == (SPLIT, 1, 1)
    assert f"{why}; its last answer" in start.said
    assert start.seconds < 4


# Faults

FAULTS = {
    "an empty answer": http(200),
    "an answer without a length": http(200, b"--device\nCUDA0\n", headers=""),
    "an answer in chunks": http(200, b"f\r\n--device\nCUDA0\n\r\n0\r\n\r\n", headers="Transfer-Encoding: chunked\r\n"),
    "an answer that breaks off": http(200, b"--device\nCUDA0\n", headers="Content-Length: 33\r\n"),
    "an answer with a zero byte": http(200, b"--device\nCUDA0\0\n"),
    "a header that breaks off": raw(b"HTTP/1.1 200 OK\r\nContent-"),
    "a header without end": raw(b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 10**5),
    "a header of too many lines": http(200, b"--device\nCUDA0\n", headers="X-Y: z\r\n" * 64 + "Content-Length: 15\r\n"),
    "a header of one line without end": raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20),
    "nothing": raw(b""),
    "garbage": raw(bytes(range(256)) * 100),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
    "status 500": http(500, b'{"error": "boom"}'),
    "status 401": http(401, b"--device\nCUDA0\n"),
    "status 404 and a page": http(404, b"<html></html>"),
    "status 409 for another reason": http(409, b"conflict"),
    "a megabyte": http(200, b"--device\nCUDA0\n" * 2**16),
    "more than any plan has to say": plan(("-ot", rf"blk\.({'|'.join(['1'] * 2048)})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU")),
    "a length beyond all numbers": http(200, b"--device\nCUDA0\n", headers="Content-Length: 99999999999999999999999\r\n"),
    "another model": plan(("--model", "/etc/passwd")),
    "another model behind a good flag": plan(("--device", "CUDA0", "--model", "/etc/passwd")),
    "a command in place of a value": plan(("--device", "$(touch x)")),
    "a command in place of a flag": plan(("$(touch x)", "`touch x`")),
    "a subscript in place of a flag": plan(("x[$(touch x)]", "1")),
    "a pattern in place of a value": plan(("-ngl", "*")),
    "a flag off the list": plan(("--log-file", "/tmp/x")),
    "a flag without a value": plan(("--device", "CUDA0", "--fit")),
    "an expression that does not compile": plan(("-ot", "blk\\.((0)=CPU")),
    "a buffer that is not the CPU's": plan(("-ot", "blk\\.(0)\\.ffn_(up|down|gate|gate_up)_(ch|)exps=CUDA7")),
    "two arguments in a line": plan(("--device CUDA0", "-ngl 4")),
    "a carriage return": plan(("--device\r", "CUDA0\r")),
    "a device that is not visible": plan(("--device", "CUDA2", "--split-mode", "none", "--main-gpu", "0")),
    "a device of another library": plan(("--device", "Vulkan0")),
    "a device twice": plan(("--device", "CUDA0,CUDA0", "--tensor-split", "1,2")),
    "a flag twice": plan(("--device", "CUDA0", "--device", "CUDA1")),
    "more shares than devices": plan(("--device", "CUDA0,CUDA1", "--tensor-split", "1,2,3")),
    "shares without devices": plan(("--tensor-split", "1,2")),
    "a GPU by a number": plan(("--device", "CUDA0", "--split-mode", "none", "--main-gpu", "1")),
    "no layers at all": plan(("-ngl", "-1")),
    "HTML": http(200, b"<!doctype html>\n<html></html>\n"),
}


@pytest.mark.parametrize("answering", FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_in_ollamas_own_arguments_and_one_line(library, tmp_path, answering):
    with serving(answering) as server:
        start = library.start(LOPSIDED_URL=server.url)
    check_fault(start)
    assert not list(library.cache.iterdir())
    assert not list(Path.cwd().glob("x"))
    assert not list(library.path.glob("x"))


def check_fault(start: Start) -> None:
    assert start.appended() == ()
    assert start.seconds < PROMISE_S + BUSY_S
    assert start.child is None
    assert start.files == [0, 1, 2]
    (line,) = start.said.splitlines()
    assert line.startswith("lopsided: ")
    assert line.endswith("; Ollama's own arguments")
    assert line.isprintable()
    assert "error" not in line.lower()  # Ollama shows a client the last line that looks like an error


def test_one_visible_device_means_that_there_is_no_other(library):
    with serving(plan(SPLIT)) as server:
        check_fault(library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES="1"))
        check_fault(library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES="0,-1,1"))
        check_fault(library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES=""))
        check_fault(library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES=None))
        assert library.start(LOPSIDED_URL=server.url, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b").appended() == SPLIT


@contextmanager
def never_accepting() -> Iterator[str]:
    """An address where connecting itself hangs: the queue of a listener that accepts nobody is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for client in waiting:
            client.close()


def test_whoever_is_too_slow_is_not_waited_for(tmp_path):
    _, body = answer(SPLIT)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    slow = {
        "silent": silent,
        "slow header": trickle(head + body),
        "slow body": lambda connection: (connection.sendall(head), trickle(body)(connection)),
    }
    with ThreadPoolExecutor() as pool, never_accepting() as hanging:
        runs = {"hanging": pool.submit(make_library(tmp_path / "hanging").start, LOPSIDED_URL=hanging)}
        for name, answering in slow.items():
            runs[name] = pool.submit(start_before, make_library(tmp_path / name), answering)
        starts = {name: run.result() for name, run in runs.items()}
    for name, start in starts.items():
        check_fault(start)
        assert "in time" in start.said, name


def test_the_limit_keeps_the_promise():
    (limit_us,) = re.findall(r"^LIMIT_US=(\d+) ", SCRIPT.read_text(), re.MULTILINE)
    assert int(limit_us) / 10**6 <= PROMISE_S - 0.1


def start_before(library: Library, answering: Answering) -> Start:
    with serving(answering) as server:
        return library.start(LOPSIDED_URL=server.url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        None,
        "https://127.0.0.1:1",
        "http://",
        "http://a b:1",
        "http://127.0.0.1:x",
        "http://127.0.0.1:99999",
        "http://no.such.host.invalid:1",
    ],
)
def test_an_address_that_cannot_be_used_is_a_fault(library, url):
    check_fault(library.start(LOPSIDED_URL=url))


def test_nobody_there_is_a_fault(library):
    check_fault(library.start(LOPSIDED_URL=f"http://127.0.0.1:{free_port()}"))


def test_a_token_that_would_write_headers_of_its_own_is_a_fault(library):
    with serving(plan(SPLIT)) as server:
        check_fault(library.start(LOPSIDED_URL=server.url, LOPSIDED_TOKEN="a\r\nX: y"))
    assert server.requests == []


def test_a_bash_without_network_is_a_fault(library):
    """Such a bash takes ``/dev/tcp/…`` for a file, and there is none."""
    script = library.path / "llama-server"
    script.write_text(script.read_text().replace("/dev/tcp/", "/dev/no-tcp/"))
    with serving(plan(SPLIT)) as server:
        check_fault(library.start(LOPSIDED_URL=server.url))


def test_an_old_bash_is_a_fault(library):
    script = library.path / "llama-server"
    script.write_text(script.read_text().replace("EPOCHREALTIME", "NO_SUCH_TIME"))
    with serving(plan(SPLIT)) as server:
        check_fault(library.start(LOPSIDED_URL=server.url))


@pytest.mark.parametrize("path", ["/no/such/folder", "", None])
def test_ollamas_path_need_not_lead_to_bash(library, path):
    # a service's own PATH may name a few folders of drivers alone
    with serving(plan(SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url, PATH=path).appended() == SPLIT


@pytest.mark.parametrize("arguments", [("%" * 100_000,) * 12, ("x",) * 50_000], ids=["long ones", "many"])
def test_arguments_that_nobody_would_read_are_not_sent(library, arguments):
    load = (*LOAD, *arguments)
    with serving(plan(SPLIT)) as server:
        start = library.start(*load, LOPSIDED_URL=server.url)
    assert start.appended(load) == ()
    assert start.said == "lopsided: Ollama's arguments are longer than 65536 bytes; Ollama's own arguments\n"
    assert server.requests == []


def test_the_longest_question_is_what_lopsided_reads():
    (limit,) = re.findall(r"^BODY_BYTES=(\d+) ", SCRIPT.read_text(), re.MULTILINE)
    assert int(limit) == BODY_LIMIT_BYTES


@pytest.mark.parametrize("where", ["llama-server.lopsided", f"llama-server.cache/{RECORDED.rpartition('/')[2]}"])
def test_what_is_no_file_is_not_read(library, where):
    # opening a pipe without a writer would hold the load for ever
    os.mkfifo(library.path / where)
    with serving(plan(SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    check_fault(library.start())


def test_another_shell_starts_the_real_server(library):
    start = library.start(shell=("dash",))
    assert start.appended() == ()


# The last good answer


def test_the_last_good_answer_is_used_when_lopsided_is_gone_or_odd(library):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
        server.answering = http(500)
        library.wait()
        start = library.start(*("51656" if argument == "40967" else argument for argument in LOAD), LOPSIDED_URL=server.url)
    assert start.arguments[-len(SPLIT) :] == SPLIT
    assert start.said == f"lopsided: {server.url} answers with HTTP status 500; its last answer: {' '.join(SPLIT)}\n"


@pytest.mark.parametrize(
    "changed",
    [
        {"arguments": tuple("8192" if argument == "4096" else argument for argument in LOAD)},
        {"arguments": tuple(argument.replace("b18c", "b18d") for argument in LOAD)},
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "1,0"},
        {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        {"OLLAMA_SCHED_SPREAD": "1"},
    ],
    ids=str,
)
def test_the_last_answer_is_for_the_same_load_only(library, changed):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    library.wait()
    arguments = changed.pop("arguments", LOAD)
    assert library.start(*arguments, LOPSIDED_URL=server.url, **changed).appended(arguments) == ()


def test_a_last_answer_that_was_given_just_now_may_not_have_worked(library):
    # the first time by lopsided itself, which then ended: the same load so soon is Ollama's next try
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    for _ in range(2):
        again = library.start(LOPSIDED_URL=server.url)
        assert again.appended() == ()
        assert "tried just now" in again.said
        library.wait()
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT


@pytest.mark.parametrize(("names", "appended"), [("ROCm0 RPC0", True), ("RPC0 ROCm1", False), ("", False)])
def test_devices_that_a_kept_answer_names_must_still_be_there(library, names, appended):
    # shows: Ollama's environment does not say what ROCm, Vulkan and other machines have, so the list is asked
    (library.path / "devices").write_text(ROCM_LIST)
    with serving_devices(plan(ROCM_SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    library.wait()
    (library.path / "devices").write_text("".join(f"  {name}: X (16368 MiB, 16000 MiB free)\n" for name in names.split()))
    start = library.start(LOPSIDED_URL=server.url)
    assert start.appended() == (ROCM_SPLIT if appended else ())
    assert library.listed() == 2
    assert len(start.said.splitlines()) == 1


def test_a_kept_answer_for_cuda_is_used_without_the_list(library):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    library.wait()
    assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    assert library.listed() == 0


def test_the_answer_stock_is_remembered_too(library):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
        server.answering = http(204)
        library.start(LOPSIDED_URL=server.url)
    assert library.start(LOPSIDED_URL=server.url).appended() == ()


def test_a_record_that_cannot_be_written_leaves_nothing_behind(library):
    record = library.cache / RECORDED.rpartition("/")[2]
    record.mkdir()
    with serving(plan(SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    assert (list(library.cache.iterdir()), list(record.iterdir())) == ([record], [])


@pytest.mark.parametrize("cut", range(0, 210, 30))
def test_of_a_record_whose_writing_was_cut_off_nothing_is_used(library, cut):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    library.wait()
    (record,) = library.cache.iterdir()
    record.write_bytes(record.read_bytes()[:cut])
    check_fault(library.start(LOPSIDED_URL=server.url))


def test_a_few_answers_are_kept_for_each_model(library):
    def load(context: int) -> tuple[str, ...]:
        return ("--model", RECORDED, "-c", str(context))

    with serving(plan(SPLIT)) as server:
        for context in range(1, 11):
            library.start(*load(context), LOPSIDED_URL=server.url)
    (record,) = library.cache.iterdir()
    assert record.name == RECORDED.rpartition("/")[2]
    assert len(record.read_text().splitlines()) == 8
    library.wait()
    assert library.start(*load(3), LOPSIDED_URL=server.url).appended(load(3)) == SPLIT
    assert library.start(*load(2), LOPSIDED_URL=server.url).appended(load(2)) == ()


@pytest.mark.parametrize("answer_kept", ["--model /etc/passwd", "--device $(touch$IFS$9x)", "junk", "--device CUDA0 --fit"])
def test_a_kept_answer_is_checked_like_any_other(library, answer_kept):
    with serving(plan(SPLIT)) as server:
        library.start(LOPSIDED_URL=server.url)
    record = next(library.cache.iterdir())
    record.write_text(record.read_text().replace(" ".join(SPLIT), answer_kept))
    library.wait()
    check_fault(library.start(LOPSIDED_URL=server.url))


@pytest.mark.parametrize("content", [b"\0\xff" * 5000, b"\t\t\t\n", b"x" * 10**5])
def test_a_damaged_record_is_no_record(library, content):
    (library.cache / RECORDED.rpartition("/")[2]).write_bytes(content)
    check_fault(library.start(LOPSIDED_URL=f"http://127.0.0.1:{free_port()}"))


def test_without_its_folder_nothing_is_kept_and_all_else_works(library):
    library.cache.rmdir()
    with serving(plan(SPLIT)) as server:
        assert library.start(LOPSIDED_URL=server.url).appended() == SPLIT
    check_fault(library.start(LOPSIDED_URL=server.url))
    assert not library.cache.exists()


# What Ollama's own environment may bring along


def test_settings_and_functions_of_a_user_do_not_reach_the_script(library):
    # a trace would print the token to Ollama's log, and a function could stand for any command
    odd = {
        "SHELLOPTS": "xtrace",
        "BASH_ENV": str(library.path / "rc"),
        "BASH_FUNC_printf%%": "() { echo hijacked >&2; }",
        "BASH_FUNC_exec%%": "() { echo hijacked >&2; }",
    }
    (library.path / "rc").write_text("echo hijacked >&2\n")
    with serving(plan(SPLIT)) as server:
        start = library.start(LOPSIDED_URL=server.url, LOPSIDED_TOKEN="s3cret", **odd)
    assert start.appended() == SPLIT
    assert start.said == f"lopsided: {' '.join(SPLIT)}\n"


def test_what_the_script_keeps_in_variables_does_not_leave_it(library):
    (library.path / "llama-server.lopsided").write_text("LOPSIDED_URL=http://127.0.0.1:1\nLOPSIDED_TOKEN=s3cret\n")
    exported = dict.fromkeys(("token", "url", "host", "body", "extra", "collected", "record_answer", "seconds"), "mine")
    environment = library.start(**exported).environment
    assert "s3cret" not in str(environment)
    assert {environment.get(name) for name in exported} <= {None, "mine"}


def test_killed_while_it_asks_it_leaves_nobody_with_ollamas_pipe(library):
    with serving(silent) as server:
        process = subprocess.Popen(
            [library.path / "llama-server", *LOAD],
            env={"PATH": os.environ["PATH"], "LOPSIDED_URL": server.url, "CUDA_VISIBLE_DEVICES": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 10
        while not server.requests:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        begin = time.monotonic()
        assert process.communicate(timeout=10) == (b"", b"")  # returns once nobody has the pipes any more
        assert time.monotonic() - begin < 1.0


# Cost and form


def test_asking_costs_little(library):
    """Least of several, since anything may come between: typically 10 ms, and the promise is 20."""
    with serving(plan(SPLIT)) as server:
        asked = min(library.start(LOPSIDED_URL=server.url).seconds for _ in range(7))
    alone = min(library.start(LOPSIDED_URL=server.url, shell=("dash",)).seconds for _ in range(7))
    assert asked - alone < 0.1


@pytest.mark.parametrize("name", ["llama-server", "entrypoint"])
def test_shellcheck_finds_nothing(name):
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), ROOT / "docker" / name],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert checked.stdout + checked.stderr == ""
