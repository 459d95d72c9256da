"""Data types, reduction operators, and which go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, SupportsFloat

import numpy as np

from pccl.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """A type of elements. There is one record for each, in `DTYPES`."""

    name: str
    """As numpy and torch call it; goes over the wire."""
    kind: str
    """``float``, ``complex``, ``int``, ``uint`` or ``bool``."""
    itemsize: int
    """Bytes of an element."""

    @property
    def half(self) -> bool:
        """Whether it is a float of 16 bits, which is reduced in float32."""
        return self.kind == "float" and self.itemsize == 2

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype, in this machine's byte order."""
        return _numpy(self.name)

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return dtype_named, (self.name,)  # one record for each name, also after pickling


DTYPES: Mapping[str, DType] = {
    record.name: record
    for record in (
        DType("float16", "float", 2),
        DType("bfloat16", "float", 2),
        DType("float32", "float", 4),
        DType("float64", "float", 8),
        DType("int8", "int", 1),
        DType("int16", "int", 2),
        DType("int32", "int", 4),
        DType("int64", "int", 8),
        DType("uint8", "uint", 1),
        DType("uint16", "uint", 2),
        DType("uint32", "uint", 4),
        DType("uint64", "uint", 8),
        DType("bool", "bool", 1),
        DType("complex64", "complex", 8),
        DType("complex128", "complex", 16),
    )
}


@cache
def _numpy(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # late: it costs 5 ms, and few need it

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


# Byte order is part of a numpy dtype's identity, so that foreign ones are not in here. bfloat16 comes in when it is first met.
_record_of: dict[np.dtype[Any], DType] = {_numpy(name): record for name, record in DTYPES.items() if name != "bfloat16"}


def dtype_named(name: str) -> DType:
    """The record of that name.

    Raises:
        InvalidArgument: there is none.
    """
    record = DTYPES.get(name)
    if record is None:
        raise InvalidArgument(f"dtype: {name!r} is not supported; it can be {', '.join(DTYPES)}")
    return record


def dtype_of(dtype: np.dtype[Any], name: str = "tensor") -> DType:
    """The record of a numpy dtype.

    Args:
        dtype: a dtype as arrays have it.
        name: the argument that has it, for the error.

    Raises:
        InvalidArgument: elements of this type, or in this byte order, cannot be sent.
    """
    record = _record_of.get(dtype)
    if record is None:
        if dtype.name == "bfloat16" and dtype == _numpy("bfloat16"):
            record = _record_of[dtype] = DTYPES["bfloat16"]
        elif not dtype.isnative:
            raise InvalidArgument(f"{name}: {dtype.str!r} is not in this machine's byte order; convert it to {dtype.name}")
        else:
            raise InvalidArgument(f"{name}: elements of type {dtype} are not supported; they can be {', '.join(DTYPES)}")
    return record


# --- operators ----------------------------------------------------------------------------------------------------------

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_COMPLEX = frozenset({"complex64", "complex128"})
_INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
_BOOL = frozenset({"bool"})

LEGAL: Mapping[str, frozenset[str]] = {
    "sum": _FLOATS | _COMPLEX | _INTEGERS,
    "avg": _FLOATS | _COMPLEX,
    "prod": _FLOATS | _COMPLEX | _INTEGERS,
    "min": _FLOATS | _INTEGERS | _BOOL,
    "max": _FLOATS | _INTEGERS | _BOOL,
    "band": _INTEGERS | _BOOL,
    "bor": _INTEGERS | _BOOL,
    "bxor": _INTEGERS | _BOOL,
    "premul_sum": _FLOATS | _COMPLEX,
}
"""Operator -> names of the dtypes that it is defined on."""

_ADVICE: Mapping[tuple[str, str], str] = {
    ("sum", "bool"): "use 'bor' for any, or sum it as integers to count",
    ("prod", "bool"): "use 'band' for all",
    ("avg", "int"): "use 'sum' and divide as you like it rounded",
    ("avg", "uint"): "use 'sum' and divide as you like it rounded",
    ("min", "complex"): "complex numbers have no order",
    ("max", "complex"): "complex numbers have no order",
}


@dataclass(frozen=True, slots=True)
class ReduceOp:
    """How elements are combined. All members of a call give an operator of the same name."""

    name: str
    """A key of `LEGAL`."""
    factor: float = 1.0
    """premul_sum: what this peer's input is multiplied by; every peer may have its own."""

    def __str__(self) -> str:
        return f"premul_sum({self.factor:g})" if self.name == "premul_sum" else self.name


_OPS = {name: ReduceOp(name) for name in LEGAL if name != "premul_sum"}


def premul_sum(factor: SupportsFloat) -> ReduceOp:
    """The sum of every peer's input times the factor that it gave, as in NCCL.

    The product is rounded to the tensor's dtype before it is sent.

    Args:
        factor: a finite real number; peers may give different ones.

    Raises:
        InvalidArgument: it is none.
    """
    if isinstance(factor, (bool, np.bool_, np.complexfloating)) or not hasattr(factor, "__float__"):
        raise InvalidArgument(f"factor: a finite real number is needed, not {factor!r}")
    try:
        value = float(factor)
    except (TypeError, ValueError, OverflowError) as e:  # an array of several elements, an integer beyond all floats
        raise InvalidArgument(f"factor: a finite real number is needed, not {factor!r} ({e})") from None
    if not math.isfinite(value):
        raise InvalidArgument(f"factor: a finite real number is needed, not {value!r}")
    return ReduceOp("premul_sum", value)


def reduce_op(op: str | ReduceOp, dtype: DType, name: str = "op") -> ReduceOp:
    """The operator that a caller gave, checked against the dtype that it is to work on.

    Args:
        op: an operator's name, or what `premul_sum` returned.
        dtype: the elements' type.
        name: the argument, for the error.

    Raises:
        InvalidArgument: there is no such operator, or it is not defined on this dtype.
    """
    found = op if isinstance(op, ReduceOp) else _OPS.get(op) if isinstance(op, str) else None
    if found is None or found.name not in LEGAL:
        if op == "premul_sum":
            raise InvalidArgument(f"{name}: 'premul_sum' needs a factor; give pccl.premul_sum(factor)")
        raise InvalidArgument(f"{name}: {op!r} is no operator; it can be {', '.join(map(repr, _OPS))} or pccl.premul_sum(factor)")
    if dtype.name not in LEGAL[found.name]:
        advice = _ADVICE.get((found.name, dtype.kind))
        allowed = ", ".join(other for other, dtypes in LEGAL.items() if dtype.name in dtypes)
        raise InvalidArgument(
            f"{name}: {found.name!r} is not defined on {dtype}{f' ({advice})' if advice else ''}; {dtype} allows {allowed}"
        )
    return found
