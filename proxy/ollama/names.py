"""Names: of blobs, and of derived models, which tell by themselves whose they are and what they stand for.

``STAMP.HOST.lopsided.invalid/NAMESPACE/MODEL:TAG`` is the model ``HOST/NAMESPACE/MODEL:TAG`` with the placement options that
``STAMP`` is the hash of. The top level ``.invalid`` belongs to nobody (RFC 2606), so no registry can ever serve such a name,
and a user's own model never has it by chance. Everything behind the host is the base's own, since Ollama itself looks there: a
model called ``deepseek-r1`` has its thoughts filtered, and ``12b`` in gemma4's name picks the prompt (``server/routes.go``,
``server/renderer_resolution.go``, 0.32). After a crash the name alone says what to remove.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from proxy.ollama.options import PLACEMENT_OPTIONS, Options

SUFFIX = ".lopsided.invalid"
"""How the host of every derived name ends."""

STAMP_LETTERS = 12
"""48 bits: enough to tell one model's placements apart, and a chance in 10^14 to take a user's model for our own."""

DEFAULT_PARTS = ("registry.ollama.ai/library/", "registry.ollama.ai/")
"""What Ollama leaves out of a name that it shows: the first that fits."""

_LETTERS = str.maketrans("0123456789abcdef", "ghijklmnopqrstuv")  # no digits: "12b" or "e4b" must not come about by chance
_DERIVED = re.compile(rf"([g-v]{{{STAMP_LETTERS}}})\.([^/]+){re.escape(SUFFIX)}/([^/]+/[^/]+)", re.IGNORECASE)


def blob_name(path: str) -> str:
    """A blob's name whether a launch, ``/api/show`` or a digest gives it: ``sha256-…``."""
    return path.rpartition("/")[2].replace(":", "-")


def derived_name(base: str, blob: str, options: Options) -> str:
    """What the model ``base`` (all four parts, as Ollama spells them) is called with ``options``; ``blob`` is its weights'."""
    host, _, rest = base.partition("/")
    return f"{stamp(blob, options)}.{host}{SUFFIX}/{rest}"


def base_of(name: str) -> str | None:
    """The model that the derived ``name`` stands for, in all four parts; ``None`` for every other name."""
    match = _DERIVED.fullmatch(name)
    return f"{match[2]}/{match[3]}" if match else None


def is_stamped(name: str, blob: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the derived ``name`` was given to a model of these weights and parameters: then it is of lopsided's making."""
    match = _DERIVED.fullmatch(name)
    return match is not None and match[1].lower() == stamp(blob, parameters)


def shown(full: str) -> str:
    """A name as Ollama's lists show it (``DisplayShortest``): without the default host and namespace."""
    part = next((part for part in DEFAULT_PARTS if full.lower().startswith(part)), "")
    return full[len(part) :]


def stamp(blob: str, options: Mapping[str, Any]) -> str:
    """The letters for weights and the placement among ``options``; other options do not count."""
    placement = {name: options[name] for name in PLACEMENT_OPTIONS if name in options}
    text = f"{blob_name(blob)} {json.dumps(placement, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:STAMP_LETTERS].translate(_LETTERS)
