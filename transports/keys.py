"""CURVE key pairs, the files they are kept in, and lists of the keys that a master allows.

A key pair's file belongs to its owner alone. A list of allowed keys is public: one key per line, a name after it if one likes, comments
after a #.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from pccl.core.address import KEY_BYTES, key_text, parse_key
from pccl.core.errors import InvalidArgument

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


class KeyPair(NamedTuple):
    """Who a master or peer is: others know the public half."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair({key_text(self.public)})"  # the secret stays out of logs


def new_keypair() -> KeyPair:
    """A key pair that nobody has."""
    public, secret = zmq.curve_keypair()
    return KeyPair(z85.decode(public), z85.decode(secret))


def save_keypair(path: PathLike, pair: KeyPair) -> None:
    """Write a new file that only its owner may read.

    Raises:
        InvalidArgument: the file exists, or cannot be written.
    """
    text = (
        "# A pccl key pair. Keep this file to yourself: whoever reads it can pass for you.\n"
        f"public = {key_text(pair.public)}\n"
        f"secret = {key_text(pair.secret)}\n"
    )
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidArgument(f"{path}: exists, and a key is never overwritten; delete it first or choose another name") from None
    except OSError as e:
        raise InvalidArgument(f"{path}: cannot be written ({e.strerror})") from None
    with os.fdopen(fd, "w") as file:
        file.write(text)


def load_keypair(path: PathLike) -> KeyPair:
    """The key pair in a file that `save_keypair` wrote.

    Raises:
        InvalidArgument: there is none, or others may read it.
    """
    try:
        with open(path) as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise InvalidArgument(f"{path}: others may read this secret; run: chmod 600 {path}")
            lines = file.read().splitlines()
    except OSError as e:
        raise InvalidArgument(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path}: not a key file") from None
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            name, _, value = text.partition("=")
            if name.strip() not in ("public", "secret"):
                raise InvalidArgument(f"{path}, line {number}: 'public = ...' or 'secret = ...' is needed")
            # Not parse_key's own error: it would show the secret.
            try:
                found[name.strip()] = parse_key(value.strip())
            except InvalidArgument:
                raise InvalidArgument(f"{path}, line {number}: not a key") from None
    if set(found) != {"public", "secret"}:
        raise InvalidArgument(f"{path}: not a key file; make one with `pccl keys new`")
    pair = KeyPair(found["public"], found["secret"])
    if z85.decode(zmq.curve_public(z85.encode(pair.secret))) != pair.public:
        raise InvalidArgument(f"{path}: the public key is not that of the secret one")
    return pair


def load_allowed(path: PathLike) -> dict[bytes, str]:
    """The keys in a list, with the names after them.

    Raises:
        InvalidArgument: the file cannot be read, or a line is wrong; the text says which.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as e:
        raise InvalidArgument(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path}: not a list of keys") from None
    allowed: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split(maxsplit=1)
        if words:
            allowed[parse_key(words[0], f"{path}, line {number}")] = words[1].strip() if len(words) > 1 else ""
    return allowed


class AllowList:
    """Which public keys may connect: those given, or those in a file, which is read again whenever it has changed."""

    def __init__(self, source: PathLike | Iterable[bytes]) -> None:
        self._path: PathLike | None = None
        self._version: tuple[int, ...] = ()
        if isinstance(source, (str, os.PathLike)):
            self._path = source
            self._version = self._stat()
            self._keys = frozenset(load_allowed(source))
        else:
            self._keys = frozenset(source)
            if any(not isinstance(key, bytes) or len(key) != KEY_BYTES for key in self._keys):
                raise InvalidArgument(f"allowed: keys of {KEY_BYTES} bytes, or the path of a file with keys, are needed")

    def __contains__(self, key: bytes) -> bool:
        if self._path is not None and (version := self._stat()) != self._version:
            self._version = version
            try:
                self._keys = frozenset(load_allowed(self._path))
            except InvalidArgument as e:  # half written, perhaps: those that were allowed stay so
                log.error("the list of allowed keys stays as it was: %s", e)
        return key in self._keys

    def _stat(self) -> tuple[int, ...]:
        assert self._path is not None
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino
