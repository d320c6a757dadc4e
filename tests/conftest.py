"""What tests of several folders share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import smollm2


@pytest.fixture(scope="session", autouse=True)
def _state_of_tests_stays_with_them(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever keeps state, in this process or one that it starts, keeps it out of the user's own folder."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_ends_what_tests_start() -> None:
    """A shell without job control has what it runs in the background ignore Ctrl-C, and what that starts inherits it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A real GGUF file with a real vocabulary; downloaded once, and a clear failure (never a skip) where that is impossible."""
    return smollm2.fetch()
