"""Who may use lopsided's own endpoints: local names and origins, as Ollama has it, or whoever has the token.

A page from somewhere else that a browser on this machine shows must not reach them, neither by its origin nor by a name
that it made point here (DNS rebinding). The rules are Ollama's (``allowedHostsMiddleware`` in ``server/routes.go``,
``AllowedOrigins`` in ``envconfig/config.go``).
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Iterable

LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
LOCAL_ORIGINS = tuple(
    f"{scheme}://{host}{port}"
    for host in ("localhost", "127.0.0.1", "0.0.0.0")
    for scheme in ("http", "https")
    for port in ("", ":*")
)
APP_ORIGINS = ("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*")


def is_local_host(host_header: str) -> bool:
    """Whether ``Host`` names this machine or its network: a private or loopback address, a local name, none at all."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d*)?|([^:]*)(?::\d*)?", host_header.strip())
    if match is None:
        return False
    host = (match[1] or match[2] or "").lower()
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host in ("", "localhost", socket.gethostname().lower()) or host.endswith(LOCAL_SUFFIXES)
    return ip.is_loopback or ip.is_private or ip.is_unspecified


def is_loopback(address: str) -> bool:
    """Whether a client's ``address`` is this machine's own; no name and no header can claim that."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


def is_local_origin(origin: str, also: Iterable[str] = ()) -> bool:
    """Whether ``Origin`` is a page of this machine, an application, or one of ``also`` (``*`` stands for anything)."""
    return any(
        re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), origin, re.IGNORECASE)
        for pattern in (*LOCAL_ORIGINS, *APP_ORIGINS, *also)
    )


def has_token(authorization: bytes | None, token: str | None) -> bool:
    """Whether an ``Authorization`` header bears ``token``; the comparison takes the same time whatever differs."""
    if token is None or authorization is None or authorization[:7].lower() != b"bearer ":
        return False
    return hmac.compare_digest(authorization[7:].strip(), token.encode())
