"""Typed messages in MessagePack: a message is an array of its class's code and its fields, each checked against its annotation.

Fields may be bool, int, float, str, bytes, None, unions of these, tuples (``tuple[X, ...]`` or ``tuple[X, Y]``) and NamedTuples of
such fields.
What does not fit raises WireError, whatever the bytes were; nothing else comes out of `decode`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeVar, dataclass_transform

import msgpack

MAX_ITEMS = 1 << 20
"""Fields and elements in one message, all told."""
MAX_MESSAGE = 16 << 20
"""Bytes; a longer control message is refused unread."""

T = TypeVar("T", bound=type)
Checker = Callable[[Any], Any]

_class_of: dict[int, tuple[type, list[Checker]]] = {}
_code_of: dict[type, tuple[int, Callable[[Any], Iterable[Any]]]] = {}
"""code, and what gets the values of all fields"""


class WireError(Exception):
    """Bytes from outside are not what the protocol says. Ends the connection, never reaches a caller."""


@dataclass_transform(frozen_default=True)
def message(code: int) -> Callable[[T], T]:
    """Make a class a message with this code: a frozen dataclass that `encode` and `decode` know."""

    def register(cls: T) -> T:
        made: Any = dataclass(slots=True, unsafe_hash=True)(cls)  # frozen for mypy only: to enforce it triples the time to make one
        if code in _class_of:
            raise ValueError(f"message code {code} is taken by {_class_of[code][0].__name__}")
        hints = typing.get_type_hints(made)
        names = [f.name for f in fields(made)]
        _class_of[code] = made, [_checker(hints[name]) for name in names]
        _code_of[made] = code, attrgetter(*names) if len(names) > 1 else lambda item: [getattr(item, name) for name in names]
        return made  # type: ignore[no-any-return]

    return register


def encode(item: Any) -> bytes:
    """The bytes of a message. What cannot be written in UTF-8 (names of files have such characters) becomes question marks."""
    code, values = _code_of[type(item)]
    packed: bytes = msgpack.packb([code, *values(item)], unicode_errors="replace")
    return packed


def decode(data: bytes | memoryview) -> Any:
    """The message that the bytes are.

    Raises:
        WireError: they are not a message, or a field is not of its type.
    """
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of {len(data)} bytes, {MAX_MESSAGE} are allowed")
    try:
        count = _Count() if len(data) > MAX_ITEMS else None  # a shorter one cannot have so many
        raw = msgpack.unpackb(data, use_list=False, list_hook=count, max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
        raise WireError(f"not MessagePack: {type(e).__name__}: {e}") from None
    if type(raw) is not tuple or not raw or type(raw[0]) is not int:
        raise WireError("not a message")
    known = _class_of.get(raw[0])
    if known is None:
        raise WireError(f"unknown message code {raw[0]}")
    cls, checkers = known
    if len(raw) != len(checkers) + 1:
        raise WireError(f"{cls.__name__} with {len(raw) - 1} fields instead of {len(checkers)}")
    try:
        return cls(*[check(value) for check, value in zip(checkers, raw[1:], strict=True)])
    except WireError as e:
        raise WireError(f"{cls.__name__}: {e}") from None


class _Count:
    """Gives up on a message with too many items, while it is unpacked: small ones take up to 80 times their bytes in memory."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def __call__(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        self._left -= len(items)
        if self._left < 0:
            raise ValueError(f"more than {MAX_ITEMS} items")
        return items


def _checker(hint: Any) -> Checker:
    """A function that returns a raw value as the annotation says it should be, or raises WireError."""
    origin = typing.get_origin(hint)
    if hint in (bool, int, str, bytes, type(None)):
        return _exactly(hint)
    if hint is float:
        return _number
    if origin in (typing.Union, types.UnionType):
        return _any_of(hint)
    if origin is tuple:
        args = typing.get_args(hint)
        if len(args) == 2 and args[1] is Ellipsis:
            return _tuple_of(_checker(args[0]))
        return _fixed(hint, tuple, [_checker(arg) for arg in args])
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        return _fixed(hint, lambda values: hint(*values), [_checker(hints[name]) for name in hint._fields])
    raise TypeError(f"a message cannot hold {hint!r}")


def _exactly(kind: type) -> Checker:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise WireError(f"{type(value).__name__} instead of {kind.__name__}")
        return value

    return check


def _number(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise WireError(f"{type(value).__name__} instead of float")
    return float(value)


def _any_of(hint: Any) -> Checker:
    options: dict[type, Checker] = {}
    for arg in typing.get_args(hint):
        kinds, checker = _raw_types(arg), _checker(arg)
        if not options.keys().isdisjoint(kinds):
            raise TypeError(f"a message cannot hold {hint!r}: two of its types look alike on the wire")
        options.update(dict.fromkeys(kinds, checker))

    def check(value: Any) -> Any:
        option = options.get(type(value))
        if option is None:
            raise WireError(f"{type(value).__name__} instead of {hint}")
        return option(value)

    return check


def _raw_types(hint: Any) -> tuple[type, ...]:
    """What MessagePack makes of a value of this type."""
    if hint is float:
        return (float, int)
    return (hint,) if hint in (bool, int, str, bytes, type(None)) else (tuple,)


def _tuple_of(item: Checker) -> Checker:
    def check(value: Any) -> Any:
        if type(value) is not tuple:
            raise WireError(f"{type(value).__name__} instead of an array")
        return tuple([item(v) for v in value])

    return check


def _fixed(hint: Any, make: Callable[[list[Any]], Any], items: list[Checker]) -> Checker:
    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(items):
            what = f"{len(value)} items" if type(value) is tuple else type(value).__name__
            raise WireError(f"{what} instead of {getattr(hint, '__name__', hint)}")
        return make([item(v) for item, v in zip(items, value, strict=True)])

    return check
