"""Where a server listens or is reached, written as Ollama writes it in ``OLLAMA_HOST``."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

UPSTREAM_PORT = 11434
"""Ollama's own port (``envconfig/config.go``)."""

LISTEN_PORT = 11435
"""lopsided's port: Ollama's plus one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Scheme, host without brackets, port, and a path prefix without its slashes (``ollama`` of ``https://host/ollama``)."""

    scheme: str = "http"
    host: str = "127.0.0.1"
    port: int = UPSTREAM_PORT
    path: str = ""

    @property
    def authority(self) -> str:
        """``host:port``, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole address, without a slash at the end."""
        return f"{self.scheme}://{self.authority}" + (f"/{self.path}" if self.path else "")

    def connectable(self) -> Address:
        """The same, with an address that only a listener can have (``0.0.0.0``, ``::``, none) replaced by loopback."""
        if self.host in ("", "0.0.0.0"):
            host = "127.0.0.1"
        elif (ip := parse_ip(self.host)) and ip.is_unspecified:
            host = "::1"
        else:
            return self
        return Address(scheme=self.scheme, host=host, port=self.port, path=self.path)

    def is_loopback(self) -> bool:
        """Only this machine reaches it."""
        ip = parse_ip(self.host)
        return ip.is_loopback if ip else self.host.lower() == "localhost"


def parse_address(text: str, *, default_port: int = UPSTREAM_PORT, strict: bool = False) -> Address:
    """An address as Ollama reads ``OLLAMA_HOST`` (``envconfig.Host`` in ``envconfig/config.go``, v0.32).

    Quotes and blanks around it are dropped; without a scheme it is http and ``default_port``; with one, port 80 or 443;
    an invalid port becomes the default. ``strict`` raises ``ValueError`` there, and for a scheme other than those two.
    """
    text = text.strip().strip("\"'").strip()
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "http", text
        if rest == "ollama.com":
            scheme, rest = "https", "ollama.com:443"
    elif scheme == "http":
        default_port = 80
    elif scheme == "https":
        default_port = 443
    elif strict:
        raise ValueError("http:// or https://, or no scheme")
    rest, _, path = rest.partition("/")
    host, port = _split(rest, default_port)
    number = int(port) if port.isascii() and port.removeprefix("+").isdigit() else -1
    if not 0 <= number <= 65535:
        if strict:
            raise ValueError("a port from 0 to 65535")
        number = default_port
    return Address(scheme=scheme, host=host, port=number, path=path.strip("/"))


def _split(hostport: str, default_port: int) -> tuple[str, str]:
    """``(host, port)`` as Go's ``net.SplitHostPort`` does, with Ollama's fallbacks where that fails."""
    if hostport.startswith("["):
        host, bracket, rest = hostport[1:].partition("]")
        if bracket and rest.startswith(":") and ":" not in rest[1:]:
            return host, rest[1:]
    elif hostport.count(":") == 1:
        host, _, port = hostport.partition(":")
        return host, port
    if ip := parse_ip(hostport.strip("[]")):
        return str(ip), str(default_port)
    return hostport or "127.0.0.1", str(default_port)


@lru_cache(maxsize=256)
def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address that ``text`` is, ``None`` where it is a name. Every request asks, about the same few."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
