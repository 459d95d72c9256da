"""The arithmetic of reductions, on flat numpy arrays.

A result depends neither on the processor's type nor on the place of an element in its array, so it has the same bits on every peer:

- integers wrap around;
- float16 and bfloat16 are reduced in float32; `combine` rounds once, `fold` rounds once for all its parts;
- min and max give NaN if any input is NaN. Of zeros of both signs `combine` gives one or the other, `fold` gives +0;
- `fold` makes every NaN the one quiet NaN: processors differ in the NaNs that they make, and in which of two they pass on;
- complex products are made of real ones, without the fused operations that numpy uses on processors that have them.

Sums that overflow before avg divides them stay infinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import Context
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.collectives import halves
from pccl.collectives.halves import Halves, has_nan
from pccl.core.dtypes import ReduceOp, dtype_of

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CHUNK_BYTES = 256 << 10
"""How much of each array is worked on at once, so that intermediate results stay in the cache."""

_UFUNC: dict[str, Callable[..., Any]] = {
    "sum": np.add,
    "avg": np.add,
    "premul_sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}


class Kernels:
    """The operations, with the scratch that they need (below 1 MiB): one object for each thread.

    Arrays are 1-D, contiguous, and in one call of one length and, except for `convert`, of one dtype. Whoever makes the call has
    checked them, and operator and dtype (`reduce_op`). Any two arrays of a call are the same memory or disjoint; they need not be
    aligned. Work on large blocks releases the interpreter's lock.
    """

    def __init__(self) -> None:
        self._quietly = without_warnings()
        self._halves = Halves()
        self._sums = np.empty(0, np.uint8)
        self._products = np.empty(0, np.uint8)

    def prepare(self, op: ReduceOp, out: Array, x: Array) -> None:
        """``out`` = what x contributes: x times the factor of premul_sum, rounded once; else x itself. out may be x."""
        if op.name == "premul_sum":
            scale = self._scale_halves if dtype_of(x.dtype).half else _scale
            self._quietly(scale, out, x, op.factor)
        elif out is not x:
            np.copyto(out, x)

    def combine(self, op: ReduceOp, out: Array, a: Array, b: Array) -> None:
        """``out = a op b``; out may be a or b."""
        dtype = dtype_of(out.dtype)
        if dtype.half or (dtype.kind == "complex" and op.name == "prod"):
            self.fold(op, out, (a, b))
        else:
            self._quietly(_UFUNC[op.name], a, b, out=out)

    def fold(self, op: ReduceOp, out: Array, parts: Sequence[Array], *, divide_by: int = 1, canonical: bool = True) -> None:
        """``out = parts[0] op parts[1] op ...``, from left to right, then divided; out may be one of the parts.

        Args:
            op: the operator.
            out: gets the result.
            parts: one or more.
            divide_by: the world size if op is avg and these are all contributions. `finish` must not follow.
            canonical: False leaves NaNs as they are, if no other peer folds the same parts: what one peer computes and the others
                copy is the same in any case. It saves looking for them, a fifth of the time for large arrays. 16-bit floats
                are looked through all the same.
        """
        if dtype_of(out.dtype).half:
            self._quietly(self._fold_halves, op, out, parts, divide_by)
        else:
            self._quietly(self._fold, op, out, parts, divide_by, canonical)

    def quick(self, op: ReduceOp, dtype: np.dtype[Any], parts: int) -> Callable[..., None] | None:
        """What `fold` with ``canonical=False`` comes to for two parts, as a function of both and of the output; None if it is more than one
        operation.
        """
        plain = op.name in ("sum", "premul_sum", "band", "bor", "bxor") or (op.name == "prod" and dtype.kind != "c")
        return partial(self._quietly, _UFUNC[op.name]) if parts == 2 and plain and not dtype_of(dtype).half else None

    def finish(self, op: ReduceOp, x: Array, world: int) -> None:
        """What is left to do, in place, when all contributions are in: avg divides by the world size."""
        if op.name == "avg" and world != 1:
            if dtype_of(x.dtype).half:
                self.fold(op, x, (x,), divide_by=world)
            else:
                self._quietly(np.divide, _reals(x), world, out=_reals(x))

    def convert(self, out: Array, x: Array) -> None:
        """``out = x`` from float16 or bfloat16 to float32, exactly, or back, rounded and with NaNs as by `fold`. Disjoint arrays."""
        self._quietly(self._widen if out.itemsize == 4 else self._narrow, out, x)

    def _fold(self, op: ReduceOp, out: Array, parts: Sequence[Array], divide_by: int, canonical: bool) -> None:
        step = CHUNK_BYTES // out.itemsize
        if 0 < out.size <= step:
            self._fold_chunk(op, out, parts, divide_by, canonical)
            return
        for low in range(0, out.size, step):
            here = slice(low, low + step)
            self._fold_chunk(op, out[here], [part[here] for part in parts], divide_by, canonical)

    def _fold_chunk(self, op: ReduceOp, out: Array, parts: Sequence[Array], divide_by: int, canonical: bool) -> None:
        kind = out.dtype.kind
        operate = self._product if kind == "c" and op.name == "prod" else _UFUNC[op.name]
        total, between = parts[0], parts[1:-1]
        if between:
            if not self._sums.size:
                self._sums = np.empty(CHUNK_BYTES, np.uint8)
            sums = self._sums[: out.nbytes].view(out.dtype)
            for part in between:  # not yet into out: that may be the memory of a part still to be read
                total = operate(total, part, out=sums)
        if len(parts) > 1:
            operate(total, parts[-1], out=out)
        else:
            np.copyto(out, total)
        if kind in "fc":
            reals = _reals(out)
            _settle(op, reals, divide_by)
            if canonical and has_nan(reals):
                reals[np.isnan(reals)] = np.nan

    def _fold_halves(self, op: ReduceOp, out: Array, parts: Sequence[Array], divide_by: int) -> None:
        ufunc = _UFUNC[op.name]
        for low in range(0, out.size, halves.CHUNK):
            here = slice(low, low + halves.CHUNK)
            into = out[here]
            total, term = self._floats(into.size)
            self._halves.widen(total, parts[0][here])
            for part in parts[1:]:
                self._halves.widen(term, part[here])
                ufunc(total, term, out=total)
            _settle(op, total, divide_by)
            self._halves.narrow(into, total)

    def _scale_halves(self, out: Array, x: Array, factor: float) -> None:
        for into, part in _chunks(out, x):
            scaled, _ = self._floats(part.size)
            self._halves.widen(scaled, part)
            np.multiply(scaled, np.float32(factor), out=scaled)
            self._halves.narrow(into, scaled)

    def _widen(self, out: Array, x: Array) -> None:
        for into, part in _chunks(out, x):
            self._halves.widen(into, part)

    def _narrow(self, out: Array, x: Array) -> None:
        for into, part in _chunks(out, x):
            copy, _ = self._floats(part.size)
            np.copyto(copy, part)
            self._halves.narrow(into, copy)

    def _product(self, a: Array, b: Array, out: Array) -> Array:
        """``out = a * b``, complex, at most a chunk; out may be a or b."""
        if not self._products.size:
            self._products = np.empty(3 * CHUNK_BYTES // 2, np.uint8)
        real, imag, cross = self._products[: 3 * out.nbytes // 2].view(out.real.dtype).reshape(3, -1)
        np.multiply(a.real, b.real, out=real)
        np.multiply(a.imag, b.imag, out=cross)
        np.subtract(real, cross, out=real)
        np.multiply(a.real, b.imag, out=imag)
        np.multiply(a.imag, b.real, out=cross)
        np.add(imag, cross, out=out.imag)
        out.real = real
        return out

    def _floats(self, size: int) -> tuple[Floats, Floats]:
        """Two rows of scratch, for as much as `halves` converts at once."""
        if not self._sums.size:
            self._sums = np.empty(CHUNK_BYTES, np.uint8)
        rows = self._sums.view(np.float32)
        return rows[:size], rows[halves.CHUNK : halves.CHUNK + size]


def _chunks(out: Array, x: Array) -> Iterator[tuple[Array, Array]]:
    for low in range(0, x.size, halves.CHUNK):
        yield out[low : low + halves.CHUNK], x[low : low + halves.CHUNK]


def _reals(x: Array) -> Array:
    """Complex numbers as twice as many real ones; others as they are."""
    return x.view(x.real.dtype) if x.dtype.kind == "c" else x


def _scale(out: Array, x: Array, factor: float) -> None:
    reals = _reals(x)
    np.multiply(reals, reals.dtype.type(factor), out=_reals(out))


def _settle(op: ReduceOp, x: Array, divide_by: int) -> None:
    """What is done to floats when all parts are in."""
    if divide_by != 1:
        np.divide(x, divide_by, out=x)
    if op.name in ("min", "max"):
        np.add(x, 0, out=x)  # makes -0 +0


def without_warnings() -> Callable[..., Any]:
    """A function that calls a function without numpy's warnings: infinities and NaNs are results like others.

    From numpy 2 on the setting is a context variable, so that a context of one's own does at a tenth of the cost of `errstate`.
    """
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        context = Context()
        context.run(np.seterr, all="ignore")
        return context.run

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return run
