"""Messages: what is encoded comes back, and whatever else comes is a WireError, soon and without much memory."""

from __future__ import annotations

import struct
import tracemalloc
import types
import typing
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pccl.core import codec
from pccl.core.codec import MAX_ITEMS, MAX_MESSAGE, WireError, decode, encode
from pccl.core.messages import Hello, PeerInfo, Verdict, Welcome
from pccl.core.types import CallId, Epoch

MESSAGES = [made for made, _ in codec._class_of.values()]


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values that an annotation allows."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(arg) for arg in args])
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return st.lists(values_of(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, args))
    if isinstance(hint, type) and issubclass(hint, tuple):
        hints = typing.get_type_hints(hint)
        return st.tuples(*(values_of(hints[name]) for name in hint._fields)).map(lambda values: hint(*values))  # type: ignore[attr-defined]
    return {
        bool: st.booleans(),
        int: st.integers(-(1 << 63), (1 << 64) - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=40),
        type(None): st.none(),
    }[hint]


def messages_of(kind: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{f.name: values_of(hints[f.name]) for f in fields(kind)})


any_message = st.sampled_from(MESSAGES).flatmap(messages_of)


def ends(data: bytes) -> None:
    """Decoding gives a message that is one, or raises WireError; nothing else."""
    message = error = None
    try:
        message = decode(data)
    except WireError as e:
        error = e
    if error is not None:
        assert len(str(error)) < 1000
        return
    assert type(message) in MESSAGES
    assert decode(encode(message)) == message


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=settings.default.max_examples // 5)  # type: ignore[union-attr]
@given(st.data())
def test_every_message_comes_back(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages_of(kind))
    back = decode(encode(message))
    assert back == message
    assert type(back) is kind
    assert decode(memoryview(encode(message))) == message


def test_numbers_are_what_the_fields_say() -> None:
    """True is no integer, 1 is no bool, and an integer is a float."""
    hello = Hello(1, "g", PeerInfo(b"k" * 16, "n", "h", ("e",), 1), False)
    assert decode(encode(hello)) == hello
    for odd in ({"version": True}, {"version": 1.0}, {"member": 0}, {"group": b"g"}, {"peer": None}):
        with pytest.raises(WireError, match=r"Hello: .* instead of "):
            decode(encode(replace(hello, **odd)))
    assert type(decode(encode(Welcome(1, 2))).heartbeat_interval) is float


# --- what is no message ---------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    ends(data)


@given(any_message, st.data())
def test_any_change_to_a_message(message: Any, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        match data.draw(st.sampled_from(["change", "cut", "insert", "repeat"])):
            case "change" if at < len(raw):
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(0, 20))]
            case "insert":
                raw[at:at] = data.draw(st.binary(max_size=9))
            case "repeat":
                raw[at:at] = raw[at : at + data.draw(st.integers(0, 40))]
    ends(bytes(raw))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5))
    | st.builds(msgpack.Timestamp, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 999_999_999)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=10,
)


@given(st.sampled_from(sorted(codec._class_of)), st.lists(anything, max_size=12))
def test_any_values_in_the_place_of_fields(code: int, values: list[Any]) -> None:
    ends(msgpack.packb([code, *values]))


@given(any_message, anything, st.data())
def test_one_field_of_another_type(message: Any, value: Any, data: st.DataObject) -> None:
    raw = msgpack.unpackb(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = value
    ends(msgpack.packb(raw))


def array32(n: int) -> bytes:
    return struct.pack(">BI", 0xDD, n)


HELLO = msgpack.packb([1, 1, "g"])[1:]
"""The first fields of a Hello; its peer comes next"""

BOMBS = {
    **{f"nested {n} deep": b"\x94" + HELLO + b"\x91" * n + b"\xc0\xc2" for n in (100, 400, 900, 990, 1020, 1030, 100_000)},
    **{f"pairs {n} deep": b"\x95" + HELLO + b"\x92\xc0" * n + b"\xc0\xc2" for n in (400, 500, 1000, 50_000)},
    "nested maps": b"\x81\xa1x" * 2000 + b"\xc0",
    "array of 4 G": array32((1 << 32) - 1),
    "map of 4 G": b"\xdf\xff\xff\xff\xff",
    "bytes of 4 G": b"\xc6\xff\xff\xff\xff",
    "text of 4 G": b"\xdb\xff\xff\xff\xff",
    "extension of 4 G": b"\xc9\xff\xff\xff\xff\x01",
    "4 G in a message": b"\x95\x01\x01\xa1g" + array32((1 << 32) - 1),
    "arrays of 4 G in each other": array32((1 << 32) - 1) * 500,
    "an extension": b"\x92\x01" + b"\xc7\x03\x01abc",
    "a timestamp": b"\x92\x01\xd6\xff\0\0\0\0",
    "a map": b"\x92\x01\x81\xa1a\x01",
    "no UTF-8": b"\x92\x01\xa2\xff\xfe",
    "nothing": b"",
    "an empty array": b"\x90",
    "no array": b"\x01",
    "an unknown code": b"\x91\x7f",
    "a code that is none": b"\x91\xc3",
    "trailing bytes": b"\x91\x01\x00",
    "half a message": encode(Hello(1, "g", PeerInfo(b"k" * 16, "n", "h", ("e",), 1), False))[:-3],
}


@pytest.mark.parametrize("what", BOMBS)
def test_bombs(what: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(BOMBS[what])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def deep_calls(n: int) -> None:
    """Decode with little of the interpreter's stack left."""
    if n:
        deep_calls(n - 1)
    else:
        with pytest.raises(WireError):
            decode(BOMBS["nested 900 deep"])


def test_a_nested_bomb_on_a_deep_stack() -> None:
    deep_calls(600)


MASSES = {
    "nothings": b"\xc0",
    "small arrays": b"\x91\xc0",
    "empty maps": b"\x80",
    "numbers": b"\xcd\x01\x01",
    "arrays of thousands": b"\xdc\x10\x00" + b"\xc0" * 4096,
}


@pytest.mark.parametrize("what", MASSES)
def test_no_message_takes_much_more_memory_than_the_longest_one_needs(what: str) -> None:
    item = MASSES[what]
    count = (MAX_MESSAGE - 10) // len(item)
    data = b"\x95\x01\x01\xa1g" + array32(count) + item * count
    assert len(data) <= MAX_MESSAGE
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decode(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * MAX_ITEMS


def test_a_message_that_is_too_long_is_not_looked_at() -> None:
    with pytest.raises(WireError, match="are allowed"):
        decode(bytes(MAX_MESSAGE + 1))


def test_a_large_message_is_still_a_message() -> None:
    many = tuple(range(200_000))
    verdict = Verdict(1, 2, Epoch(1, 2, 3), CallId(None, 3), "C", 0, b"p" * (2 << 20), 0, "", -1, many, (), 1, 2)
    assert decode(encode(verdict)) == verdict


# --- what cannot be said --------------------------------------------------------------------------------------------


def test_text_that_is_none_is_sent_with_question_marks() -> None:
    """Such text comes from names of files in messages of exceptions; a call must not hang for it."""
    failed = Hello(1, "a\udcffb", PeerInfo(b"", "", "", (), 1), False)
    assert decode(encode(failed)).group == "a?b"
