"""The page at ``/lopsided/``: one file, nothing from elsewhere, that reads lopsided's own JSON endpoints every two seconds."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("index.html")


def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, by which a browser runs and loads what stands in it and no more, and frames it nowhere."""
    content = PAGE.read_bytes()
    sources = {kind: _source(content, kind) for kind in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return content, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _source(content: bytes, kind: str) -> str:
    """The element ``kind`` of the page, as a policy names it: by its hash."""
    match = re.search(rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode()), content, re.DOTALL)
    text = match[1] if match else b""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
