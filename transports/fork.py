"""What a forked child must not keep.

A child inherits every descriptor. If it outlives a killed parent, its copies keep the parent's connections open, and nobody notices
the death. So descriptors are registered here, and a child gives up its copies before anything else runs in it. The parent's stay as they
are: closing a copy says nothing on the wire.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import NamedTuple

log = logging.getLogger(__name__)

Identity = tuple[int, int, str]


class _Guarded(NamedTuple):
    identity: Identity
    libzmq: bool


_guarded: dict[int, _Guarded] = {}
_callbacks: list[weakref.ref[Callable[[], None]]] = []
_registered = False


def guard(fd: int, *, libzmq: bool = False) -> None:
    """Have children give up their copy of this descriptor.

    Args:
        fd: an open descriptor; one that is already closed is ignored.
        libzmq: it is a connection or a listener of libzmq, whose poller and other descriptors are then given up with it.
    """
    identity = _identity(fd)
    if identity is not None:
        _register()
        _guarded[fd] = _Guarded(identity, libzmq)


def unguard(fd: int) -> None:
    """Forget a descriptor, before it is closed or as soon as it is known to be."""
    _guarded.pop(fd, None)


def on_fork(callback: Callable[[], None]) -> None:
    """Call this in every child, after the descriptors are gone. It is held weakly: keep the function, or the method's object, alive."""
    _register()
    _callbacks[:] = [ref for ref in _callbacks if ref() is not None]
    _callbacks.append(weakref.WeakMethod(callback) if isinstance(callback, MethodType) else weakref.ref(callback))


def _register() -> None:
    global _registered
    if not _registered:
        os.register_at_fork(after_in_child=_in_child)
        _registered = True


def _in_child() -> None:
    ours = {fd for fd, known in _guarded.items() if _identity(fd) == known.identity}
    polled = _polled_with({fd for fd in ours if _guarded[fd].libzmq})
    _guarded.clear()
    for fd in sorted(ours | polled):
        _give_up(fd)
    for ref in _callbacks:
        callback = ref()
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("a fork callback failed")


def _give_up(fd: int) -> None:
    # The number stays taken, by /dev/null: objects copied from the parent may close it again later, and must not hit a file of the child's.
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os.close(fd)
        return
    try:
        os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)


def _identity(fd: int) -> Identity | None:
    """What tells an open file from one that has its number later; None if it is closed.

    Sockets have inodes of their own. All eventfds share one, but Linux numbers them.
    """
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino, next((line for line in _info(fd) if line.startswith("eventfd-id")), "")


def _polled_with(sockets: set[int]) -> set[int]:
    """libzmq's descriptors beyond its sockets: a poller (epoll) that watches one of these is libzmq's, and so is all that it watches."""
    found: set[int] = set()
    if not sockets:
        return found
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # not Linux: what is left behind is no connection
        return found
    for fd in numbers:
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventpoll]":
                continue
        except OSError:
            continue
        watched = set(_watched(fd))
        if watched & sockets:
            found |= watched | {fd}
    return found


def _watched(poller: int) -> Iterator[int]:
    for line in _info(poller):
        words = line.split()
        if words and words[0] == "tfd:":  # tfd: 12 events: 19 data: 7f.. pos:0 ino:3e8 sdev:9
            fd, inode = int(words[1]), next((int(w[4:], 16) for w in words if w.startswith("ino:")), None)
            try:
                if os.fstat(fd).st_ino == inode:
                    yield fd
            except OSError:
                pass


def _info(fd: int) -> list[str]:
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return file.read().splitlines()
    except OSError:
        return []
