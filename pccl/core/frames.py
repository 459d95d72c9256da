"""The header in front of every frame on a link.

A DATA frame is a header, `length` bytes of payload and a seal. The seal comes last so that a sender who hears of an abort in mid-frame can
complete the frame from any memory and mark it worthless. All other kinds are a header alone.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import xxhash

from pccl.core.codec import WireError
from pccl.core.types import Epoch

MAX_PAYLOAD = 4 << 20
"""Bytes in one frame; a header that says more is not believed."""

_MAGIC = 0x5043
_BODY = struct.Struct("<HBxHHIIIIQQQ")
_CHECK = struct.Struct("<I")
_WHOLE = struct.Struct(_BODY.format + "I")
HEADER_BYTES = _WHOLE.size

SEAL_GOOD = b"pccl"
SEAL_ABORTED = b"void"
SEAL_BYTES = 4


class Kind(IntEnum):
    """What a frame is."""

    DATA = 0
    """A slice: `position` is its offset in the stream (call, sub, channel)."""
    CREDIT = 1
    """Bytes up to `position` of the stream (call, sub, channel) have a place at the sender of this frame."""
    DISCARDED = 2
    """The sender of this frame keeps nothing of the call, and will drop what still comes of it."""
    MARK = 3
    """The sender of this frame is past this epoch: nothing of it is kept."""
    STRIPES = 4
    """The link's own: whoever dialled it is asked for `position` stripes in all."""


class Header(NamedTuple):
    """A frame's header."""

    kind: int
    epoch: Epoch
    call: int = 0
    """`CallId.key`."""
    sub: int = 0
    """Which of a round's calls."""
    channel: int = 0
    position: int = 0
    length: int = 0
    signature: int = 0


def pack_header(h: Header) -> bytes:
    """The bytes of a header."""
    body = _BODY.pack(_MAGIC, h.kind, h.sub, h.channel, h.length, *h.epoch, h.call, h.position, h.signature)
    return body + _CHECK.pack(xxhash.xxh32_intdigest(body))


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """The header that the first HEADER_BYTES bytes are.

    Raises:
        WireError: they are none.
    """
    magic, kind, sub, channel, length, term, rid, number, call, position, signature, check = _WHOLE.unpack_from(data)
    if xxhash.xxh32_intdigest(data[: _BODY.size]) != check:
        raise WireError("a frame header is damaged")
    if magic != _MAGIC or kind > Kind.STRIPES or length > MAX_PAYLOAD or (length and kind != Kind.DATA):
        raise WireError(f"a frame header makes no sense: kind {kind}, {length} bytes of payload")
    return Header(kind, Epoch(term, rid, number), call, sub, channel, position, length, signature)
