"""Every exception of lopsided's own.

LopsidedError
├── SettingsError      a setting has a value that is not allowed
├── GgufError          a file is no GGUF, ends too early, or lies about its lengths
├── ModelError         a model cannot be planned, and passes through
├── GpuError           a source of GPUs does not answer
├── LauncherError      the launcher cannot be put in place or taken out
└── UpstreamError      Ollama cannot be reached or breaks off
"""

from collections.abc import Iterator
from contextlib import contextmanager


class LopsidedError(Exception):
    """Base of all below. The message says what happened, the numbers, and what to do next."""


class SettingsError(LopsidedError):
    """A setting has a value that is not allowed; names the variable, the value and what is allowed."""


class GgufError(LopsidedError):
    """A file is no GGUF, ends too early, or lies about its lengths."""


class ModelError(LopsidedError):
    """A model cannot be planned (cloud, safetensors, adapter, …); the request passes through with this reason."""


class GpuError(LopsidedError):
    """A source of GPUs does not answer or answers nonsense."""


class LauncherError(LopsidedError):
    """The launcher cannot be put in place or taken out; nothing was changed, and the message says what to do."""


class UpstreamError(LopsidedError):
    """Ollama cannot be reached, or broke off."""


@contextmanager
def fitting_together() -> Iterator[None]:
    """Turns what the planner raises for a model whose metadata and tensors contradict each other into ``ModelError``."""
    try:
        yield
    except LookupError as error:
        text = f"its metadata and its tensors do not fit together ({type(error).__name__}: {error})"
        raise ModelError(text) from error
