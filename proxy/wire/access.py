"""Who may ask: local names and origins, as Ollama has it, or whoever has the token.

A page from somewhere else that a browser on this machine shows must not reach anything, neither by its origin nor by a name
that it made point here (DNS rebinding). The rules are Ollama's (``allowedHostsMiddleware`` in ``server/routes.go``,
``AllowedOrigins`` in ``envconfig/config.go``). What belongs to Ollama is refused by Ollama itself, as long as it sees what the
client sent; here only what it would not see.
"""

from __future__ import annotations

import hmac
import re
import socket
from collections.abc import Iterable

from proxy.address import parse_ip
from proxy.config.settings import Settings
from proxy.wire.asgi import Headers, Scope
from proxy.wire.replies import Reply, error_reply

HEALTH_PATH = "/lopsided/health"
"""What a container's health check asks, over loopback; it has no token."""

LAUNCH_PATH = "/lopsided/launch"
"""Where the launcher asks; docs/launcher.md says how."""

READING = frozenset({"GET", "HEAD"})
"""Methods that change nothing."""

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
    ip = parse_ip(host)
    if ip is None:
        return host in ("", "localhost", socket.gethostname().lower()) or host.endswith(LOCAL_SUFFIXES)
    return ip.is_loopback or ip.is_private or ip.is_unspecified


def is_loopback(address: str) -> bool:
    """Whether a client's ``address`` is this machine's own; no name and no header can claim that."""
    ip = parse_ip(address)
    mapped = getattr(ip, "ipv4_mapped", None) or ip
    return mapped is not None and mapped.is_loopback


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


def lacks_token(scope: Scope, settings: Settings, *, trusted: bool) -> Reply | None:
    """The refusal where every request needs the token (``LOPSIDED_REQUIRE_TOKEN``) and this one has none.

    Two are let through: a browser's preflight, which can't bear one and only learns which headers it may send, and the health
    check over loopback.
    """
    if trusted or not settings.require_token:
        return None
    names = {name for name, _ in scope["headers"]}
    if scope["method"] == "OPTIONS" and b"access-control-request-method" in names:
        return None
    if scope["path"] == HEALTH_PATH and scope["method"] in READING and _from_here(scope):
        return None
    return error_reply(401, "this server wants a token: Authorization: Bearer LOPSIDED_TOKEN (an API key, to most clients)")


def bears_token(headers: Headers, settings: Settings) -> bool:
    """Whether a request has one ``Authorization``, and that the token: what ``trusted`` means below."""
    given = [value for name, value in headers if name == b"authorization"]
    return len(given) == 1 and has_token(given[0], settings.bearer)


def refuses_own(scope: Scope, settings: Settings, *, trusted: bool) -> Reply | None:
    """The refusal of a request to one of lopsided's own endpoints, ``None`` where it may be answered."""
    if trusted:
        return None
    if scope["path"] == LAUNCH_PATH and not _from_here(scope):
        return error_reply(403, "a launcher on another machine or in another container needs LOPSIDED_TOKEN")
    if scope["method"] not in READING and not _from_here(scope):
        return error_reply(403, "what changes anything needs LOPSIDED_TOKEN from other machines")
    host, origin = _host(scope), _origin(scope)
    if not is_local_host(host):
        return error_reply(403, f"the host {host!r} is not this machine; other hosts need LOPSIDED_TOKEN")
    if origin and not is_local_origin(origin, settings.origins):
        return error_reply(403, "pages from other origins need LOPSIDED_TOKEN, or an entry in OLLAMA_ORIGINS")
    return None


def is_foreign(scope: Scope, settings: Settings, *, trusted: bool) -> bool:
    """Whether a request for Ollama is one that Ollama on loopback refuses: it may go on to it, and has no effect here."""
    if trusted:
        return False
    host, origin = _host(scope), _origin(scope)
    if origin and origin not in (f"http://{host}", f"https://{host}") and not is_local_origin(origin, settings.origins):
        return True
    return settings.host.is_loopback() and not is_local_host(host)


def refuses_host(scope: Scope, settings: Settings, *, trusted: bool) -> Reply | None:
    """Ollama's own refusal of a foreign ``Host``, where the one behind the proxy would not see it, or is not on loopback.

    A proxy on loopback stands for an Ollama on loopback, wherever that really is (recording 52).
    """
    if trusted or not settings.host.is_loopback() or settings.upstream.is_loopback():
        return None
    return None if is_local_host(_host(scope)) else Reply(status=403, body=b"")


def without_token(headers: Headers) -> Headers:
    """The headers of a request that bears the token, less that: it is nobody's business but lopsided's."""
    return [(name, value) for name, value in headers if name != b"authorization"]


def _from_here(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback(client[0])


def _host(scope: Scope) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")


def _origin(scope: Scope) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), "")
