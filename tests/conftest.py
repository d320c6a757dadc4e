"""What tests of several folders share."""

from pathlib import Path

import pytest

from tests import smollm2


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """A real GGUF file with a real vocabulary; downloaded once, and a clear failure (never a skip) where that is impossible."""
    return smollm2.fetch()
