"""``python -m tests.fuzz --seconds 600``: every target for its share of the time, from the seeds in tests/data/fuzz.

With atheris, which is guided by coverage, where it is installed; else by blind mutation. An input that breaks a promise is
kept beside the seeds, so that ``make test`` shows it until it is mended, and afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = Path(__file__).parent.parent / "data" / "fuzz"
UNIT_S = 10
"""One input that takes longer is a fault: nobody may stop the proxy with a few bytes."""

LARGEST_BYTES = 64 * 1024


def with_atheris(name: str, seconds: int) -> int:
    """One target in a process of its own, since libFuzzer never returns."""
    with tempfile.TemporaryDirectory() as found:
        limits = [f"-max_total_time={seconds}", f"-timeout={UNIT_S}", f"-max_len={LARGEST_BYTES}", "-rss_limit_mb=2048"]
        arguments = [*limits, "-print_final_stats=1", f"-artifact_prefix={SEEDS / name}/found-", found, str(SEEDS / name)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--target", name, *arguments], check=False, stderr=subprocess.PIPE
        )
    lines = done.stderr.decode(errors="replace").splitlines()
    wanted = ("stat::number_of_executed_units", "stat::new_units_added", "stat::peak_rss_mb", "stat::slowest_unit_time_sec")
    print(f"{name}: " + ", ".join(line.removeprefix("stat::") for line in lines if line.startswith(wanted)), flush=True)
    if done.returncode:
        print("\n".join(lines[-60:]))
    return done.returncode


def target(name: str, arguments: list[str]) -> None:
    """What ``with_atheris`` starts."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=["proxy", "planner", "tests.fuzz"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup(["fuzz", *arguments], TARGETS[name])
    atheris.Fuzz()


def blindly(name: str, seconds: int) -> int:
    """Seeds with bytes changed, cut, doubled and crossed."""
    from tests.fuzz.targets import TARGETS

    chance = random.Random(0)
    pool = [path.read_bytes() for path in sorted((SEEDS / name).iterdir())]
    end, runs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutated(chance, pool)
        runs += 1
        started = time.monotonic()
        try:
            TARGETS[name](data)
            assert time.monotonic() - started < UNIT_S
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
            path = SEEDS / name / f"found-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"{name}: {type(error).__name__}: {error}: {path}")
            return 1
    print(f"{name}: {runs} inputs, without atheris")
    return 0


def mutated(chance: random.Random, pool: list[bytes]) -> bytes:
    """One more input made of those in ``pool``."""
    data = bytearray(chance.choice(pool))
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del data[at : at + chance.randrange(1, 16)]
            case 2:
                data[at:at] = data[at : at + chance.randrange(1, 64)]
            case 3:
                other = chance.choice(pool)
                data[at:at] = other[chance.randrange(len(other) + 1) :][:64]
            case _:
                data[at : at + 8] = chance.choice((b"\xff" * 8, b"\0" * 8, b'"\\"', b"{", b"]", b"9" * 20, b"\xed\xa0\x80"))
    return bytes(data[:LARGEST_BYTES])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--target", help=argparse.SUPPRESS)
    known, rest = parser.parse_known_args()
    if known.target:
        target(known.target, rest)
        return 0
    run = with_atheris if importlib.util.find_spec("atheris") else blindly
    names = sorted(path.name for path in SEEDS.iterdir())
    return max(run(name, max(known.seconds // len(names), 1)) for name in names)


if __name__ == "__main__":
    sys.exit(main())
