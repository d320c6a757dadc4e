"""``lopsided serve`` as a process of its own, for what cannot be shown in this one: signals, kills, memory, open files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers import free_port

END_S = 20.0


@dataclass
class Served:
    """The process, its base URL, and what it has printed until now (all of it once the block is left)."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.lines)


@contextmanager
def lopsided_serve(
    upstream: str, folder: Path, cards: Sequence[str] = (), *, prelude: str = "", **environment: str
) -> Iterator[Served]:
    """The command in front of ``upstream`` with a profile of ``cards`` (``NAME`` or ``NAME:FREE``).

    It is killed when the block is left, if it still runs. State stays in ``folder``. Without ``cards`` it sees no GPUs.
    Settings of this process's environment are not passed on. ``prelude`` is Python that runs before the command.
    """
    if cards:
        profile = folder / "rig.toml"
        named = (card.partition(":") for card in cards)
        rows = (f'[[gpu]]\nname = "{name}"\n' + (f'free = "{free}"\n' if free else "") for name, _, free in named)
        profile.write_text("".join(rows))
        environment = {"LOPSIDED_PROFILE": str(profile), **environment}
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LOPSIDED_", "OLLAMA_", "CUDA_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{prelude}\nfrom proxy.cli import main; main(prog_name='lopsided')", "serve"],
        env={
            **kept,
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "-1",
            "LOPSIDED_HOST": f"127.0.0.1:{port}",
            "LOPSIDED_UPSTREAM": upstream,
            "LOPSIDED_STATE": str(folder / "state"),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    served = Served(process=process, url=f"http://127.0.0.1:{port}")
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            served.lines.append(line)
            if line.startswith("GPU"):  # the last of what it says at its start; its socket listens before that
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not ready.wait(END_S) or process.poll() is not None:
            raise RuntimeError(f"it did not start: {served.text}")
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(END_S)
        reader.join(END_S)
        if process.stdout:
            process.stdout.close()
