"""Addresses: ``host:port``, ``[v6]:port`` and ``pccl://host:port?key=...``, where the key is the master's public CURVE key."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from pccl.core.errors import InvalidArgument
from pccl.core.options import DEFAULT_PORT

KEY_BYTES = 32


class Address(NamedTuple):
    """Where a master listens, and its public key if it has one."""

    host: str
    port: int
    key: bytes | None = None

    def __str__(self) -> str:
        where = join(self.host, self.port)
        return f"pccl://{where}?key={key_text(self.key)}" if self.key else where


def parse_address(text: str, name: str = "address") -> Address:
    """An address as a user writes it; the port may be left out.

    Raises:
        InvalidArgument: it is none.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"{name}: text like 'host:{DEFAULT_PORT}' is needed, not {text!r}")
    try:
        parts = urlsplit(text if "://" in text else f"pccl://{text}")
        host, port = parts.hostname, DEFAULT_PORT if parts.port is None else parts.port
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as e:
        raise InvalidArgument(f"{name}: {text!r} is not an address ({e}); write host:port or [v6]:port") from None
    junk = parts.netloc.rpartition("]")[2].partition(":")[0] if "]" in parts.netloc else ""
    odd = parts.path or parts.fragment or parts.username or junk or set(query) - {"key"}
    if parts.scheme not in ("pccl", "tcp") or not host or odd:
        raise InvalidArgument(f"{name}: {text!r} is not an address; write host:port, [v6]:port or pccl://host:port?key=...")
    return Address(host, port, parse_key(query["key"][0]) if "key" in query else None)


def parse_endpoint(text: str, name: str) -> tuple[str, int | None]:
    """``host``, ``host:port``, ``[v6]`` or ``[v6]:port``."""
    try:
        bare = ":" not in text or (text.startswith("[") and text.endswith("]")) or (text.count(":") > 1 and not text.startswith("["))
        if bare:
            if ":" in text:
                ipaddress.IPv6Address(text.strip("[]"))
            return text.strip("[]"), None
        parsed = parse_address(text, name)
    except ValueError:
        raise InvalidArgument(f"{name}: host or host:port is needed, not {text!r}") from None
    return parsed.host, parsed.port


def join(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def key_text(key: bytes) -> str:
    """A key as text that survives shells and URLs: base64url without padding."""
    return base64.urlsafe_b64encode(key).rstrip(b"=").decode()


def parse_key(text: str, name: str = "key") -> bytes:
    """The 32 bytes of a key as `key_text` writes them.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        key = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise InvalidArgument(f"{name}: {text!r} is not a key; 43 characters as `pccl keys` prints them are needed")
    return key


def is_loopback(host: str) -> bool:
    """Whether a host, as written, is this machine talking to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
