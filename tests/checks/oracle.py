"""What reductions should give, by other means than the library's: exact for integers, with a bound for floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.core.dtypes import DTYPES, DType
from pccl.core.quantization import SCALED, Quantization

Array = npt.NDArray[Any]

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53, "complex64": 2.0**-24, "complex128": 2.0**-53}
"""Relative error of one rounding"""
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
"""The smallest step, of numbers near 0"""

WRAPPING = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}


def values(dtype: str, count: int, seed: Sequence[int]) -> Array:
    """Something to reduce: integers of the whole range, floats of many sizes whose products stay in range."""
    kind, rng = DTYPES[dtype].kind, np.random.default_rng(list(seed))
    if kind == "bool":
        return rng.integers(0, 2, count).astype(bool)
    if kind in ("int", "uint"):
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    real = rng.choice(np.array([-1.0, 1.0]), count) * 2.0 ** rng.uniform(-2, 2, count)
    if kind == "complex":
        return (real + 1j * rng.standard_normal(count)).astype(dtype)
    return real.astype(DTYPES[dtype].numpy)


def check(op: str, dtype: DType, inputs: Sequence[Array], got: Array, *, algorithm: str = "", factors: Sequence[float] = ()) -> None:
    """Fail unless `got` is what the operator makes of the inputs."""
    if dtype.kind in ("int", "uint", "bool") or op in ("min", "max"):
        want = inputs[0].copy()
        for x in inputs[1:]:
            want = WRAPPING[op](want, x)
        np.testing.assert_array_equal(got, want)
        return
    wide: Any = {"float64": np.longdouble, "complex64": np.complex128, "complex128": np.clongdouble}.get(dtype.name, np.float64)
    terms = [x.astype(wide) for x in inputs]
    world, u = len(inputs), UNIT[dtype.name]
    if factors:
        terms = [x * np.float64(f) for x, f in zip(terms, factors, strict=True)]
    if op == "prod":
        want, size = terms[0].copy(), abs(terms[0])
        for x in terms[1:]:
            want, size = want * x, size * abs(x)
    else:
        want, size = sum(terms[1:], terms[0]), sum([abs(x) for x in terms[1:]], abs(terms[0]))
    if op == "avg":
        want, size = want / world, size / world
    roundings = (world + 2) * (3 if dtype.kind == "complex" and op == "prod" else 1)
    if dtype.half and algorithm in ("direct", "star"):  # rounded once, after sums in float32
        bound = 1.01 * (u * abs(want) + roundings * UNIT["float32"] * size + (u * size if factors else 0))
    else:
        bound = 1.01 * roundings * u * size
    bound = bound + 2 * world * TINY.get(dtype.name, 0.0)
    error = abs(got.astype(wide) - want)
    worst = int(np.argmax(error - bound)) if error.size else 0
    assert (error <= bound).all(), (
        f"{op} of {dtype} by {algorithm}: element {worst} is {got[worst]}, not {want[worst]} within {bound[worst]:.3g}; "
        f"inputs {[x[worst] for x in inputs]}"
    )


def same_bits(arrays: Sequence[Array]) -> None:
    """Fail unless all have the same bytes."""
    first = arrays[0]
    for other in arrays[1:]:
        assert other.dtype == first.dtype
        if first.tobytes() != other.tobytes():
            places = np.flatnonzero(first.reshape(-1).view(np.uint8) != other.reshape(-1).view(np.uint8))
            raise AssertionError(f"{len(places)} bytes differ, the first is number {places[0]}")


STEPS = {"uint8": 255 - 2**-12, "int8": 127 - 2**-12, "uint4": 15 - 2**-12}
"""Of the codes, between the ends of a block"""


def encoding_error(q: Quantization, x: Array) -> Array:
    """The bound on the error of one encoding, element by element; see docs/quantization.md."""
    wide = x.astype(np.float64)
    share = 1.0 if q.stochastic else 0.5
    if q.kind not in SCALED:
        return share * np.maximum(2 * UNIT[q.kind] * abs(wide), TINY[q.kind])
    errors = np.empty(x.size)
    for low in range(0, x.size, q.block):
        part = wide[low : low + q.block]
        most = abs(part).max()
        span = most if q.kind == "int8" else part.max() - part.min()
        errors[low : low + q.block] = span / STEPS[q.kind] * (share + 2**-12) + 2 * 2.0**-24 * most + 2.0**-118
    return errors
