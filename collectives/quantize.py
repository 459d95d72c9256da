"""The arithmetic of quantization, on flat numpy arrays: elements to records, records to elements, and reductions of either.

A *record* stands for a block of elements. Everything is worked out in float32, whatever the tensor's dtype:

- uint8, uint4: the least element ``low``, a ``step``, and a code for each element, which stands for ``low + code * step``. The step is the
  distance from the least to the largest element, divided by 255 or 15 (less 2**-12, so that stochastic rounding stays below the last
  code).
- int8: a ``step``, the largest magnitude divided by 127 (less 2**-12), and a code from -127 to 127, which stands for ``code * step``.
- bfloat16, float16: the elements, rounded.

Error of one encoding, for elements of magnitude up to m in the block; u is 2**-24, the rounding of float32:

- scaled kinds: at most ``step * (1/2 + 2**-12) + 2 * u * m`` rounded to nearest, ``step * (1 + 2**-12) + 2 * u * m`` stochastically; plus
  2**-118, since a block whose elements are closer together than that is taken for constant;
- bfloat16: ``2**-8 * m`` or ``2**-7 * m`` with m the element's own magnitude (and half of 2**-133, or all, at least);
- float16: ``2**-11 * m`` or ``2**-10 * m`` (and half of 2**-24, or all, at least).

Elements of float64 are rounded to float32 first, results to the tensor's dtype at the end.

A block of a scaled kind that holds a NaN or an infinity, or spans 2**127 or more, decodes to NaN throughout: always the same NaN. In
bfloat16 and float16 NaNs and infinities stay what they are, and what is too large becomes infinite.

Stochastic rounding draws 16 bits for each element, from a generator that depends on the seed, on who encodes what for the how
manieth time, and on the element's place; not on how the work is cut up. It is biased by less than 2**-16 steps, and not at all for
bfloat16 and normal float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pccl.collectives.halves import has_nan
from pccl.collectives.reduction import Kernels, without_warnings
from pccl.core.dtypes import dtype_named
from pccl.core.quantization import SCALED, Quantization

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CHUNK = 1 << 16
"""Elements that are worked on at once, at least a block: with all that they need they stay in the cache."""
GRAIN = 64
"""Elements of a record without a scale."""

_LEVELS = {"uint8": np.float32(255 - 2**-12), "int8": np.float32(127 - 2**-12), "uint4": np.float32(15 - 2**-12)}
_NARROWEST = np.float32(2.0**-118)  # a block spans this or nothing: steps and their inverses are normal numbers
_WIDEST = np.float32(2.0**127)  # no multiple of a step overflows
_MAGIC = np.float32(3 << 22)  # floats around it are whole numbers: added to it, x is rounded, into the lowest bits


class Arithmetic(Protocol):
    """A reduction of float32."""

    def combine(self, out: Array, a: Array, b: Array) -> None:
        """out = a op b"""

    def finish(self, x: Array) -> None:
        """Every contribution is in."""


class Draw(NamedTuple):
    """Whose chance it is."""

    rank: int
    """Who encodes"""
    nth: int
    """Which time, if it encodes the same elements several times"""
    at: int
    """Place of the first record"""


def block_of(q: Quantization) -> int:
    """Elements that a record stands for."""
    return q.block if q.kind in SCALED else GRAIN


@lru_cache(maxsize=256)
def record_type(q: Quantization) -> np.dtype[Any]:
    """The dtype of a record: what travels."""
    if q.kind == "uint8":
        fields: list[Any] = [("low", np.float32), ("step", np.float32), ("codes", np.uint8, (q.block,))]
    elif q.kind == "int8":
        fields = [("step", np.float32), ("codes", np.int8, (q.block,))]
    elif q.kind == "uint4":  # one half of the block in the lower bits, the other in the upper ones
        fields = [("low", np.float32), ("step", np.float32), ("codes", np.uint8, (q.block // 2,))]
    else:
        fields = [("codes", dtype_named(q.kind).numpy, (GRAIN,))]
    return np.dtype(fields)


def is_coded(x: Array) -> bool:
    """Whether an array is one of records."""
    return x.dtype.names is not None


class Codec:
    """Encodes, decodes and reduces, with the scratch that this needs (below 1 MiB): one object for each thread.

    Arrays are 1-D and contiguous: *plain*, of floats of any dtype, or *coded*, of records. A plain array of n elements goes with a coded
    one of ``ceil(n / block)`` records; what fills up the last one has no meaning.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._quietly = without_warnings()
        self._rows: list[Floats] = []
        self._bits = np.random.PCG64(0)

    def encode(self, q: Quantization, out: Array, x: Array, draw: Draw) -> None:
        """Coded ``out`` = plain x; `draw` is for stochastic rounding."""
        self._quietly(self._run, q, None, out, [x], False, x.size, draw)

    def decode(self, q: Quantization, out: Array, x: Array) -> None:
        """Plain ``out`` = coded x."""
        self._quietly(self._run, q, None, out, [x], False, out.size, None)

    def fold(self, q: Quantization, arithmetic: Arithmetic, out: Array, parts: Sequence[Array], final: bool, size: int, draw: Draw) -> None:
        """``out = parts[0] op parts[1] op ...``, from left to right in float32, finished if final, and rounded once.

        Args:
            out: plain or coded; may be one of the parts.
            parts: two or more, each plain or coded.
            size: elements of each.
            draw: for stochastic rounding, if out is coded.
        """
        self._quietly(self._run, q, arithmetic, out, parts, final, size, draw)

    def _run(
        self,
        q: Quantization,
        arithmetic: Arithmetic | None,
        out: Array,
        parts: Sequence[Array],
        final: bool,
        size: int,
        draw: Draw | None,
    ) -> None:
        if not self._rows:
            self._rows = [np.empty(CHUNK, np.float32) for _ in range(3)]
        block = block_of(q)
        rows = CHUNK // block
        dice = self._dice(q, draw) if q.stochastic and draw and is_coded(out) else None
        for low in range(0, -(-size // block), rows):
            high = min(low + rows, size // block)
            if low < high:
                self._chunk(q, arithmetic, out, parts, final, dice, slice(low, high), slice(low * block, high * block))
            if high < min(low + rows, -(-size // block)):  # the last record lacks elements, and is worked on by itself
                self._chunk(q, arithmetic, out, parts, final, dice, slice(high, high + 1), slice(high * block, size))

    def _chunk(
        self,
        q: Quantization,
        arithmetic: Arithmetic | None,
        out: Array,
        parts: Sequence[Array],
        final: bool,
        dice: np.random.PCG64 | None,
        records: slice,
        elements: slice,
    ) -> None:
        shape = (records.stop - records.start, block_of(q))
        total, term, work = [row[: shape[0] * shape[1]].reshape(shape) for row in self._rows]
        whole = elements.stop - elements.start == total.size
        into = out[records if is_coded(out) else elements]
        straight = not arithmetic and whole and into.dtype == np.float32
        if straight:
            total = into.reshape(shape)

        def load(x: Array, scratch: Floats) -> Floats:
            if is_coded(x):
                self._decode(q, scratch, x[records])
                return scratch
            piece = x[elements]
            if whole and piece.dtype == np.float32:
                return piece.reshape(shape)
            self._convert(scratch.reshape(-1)[: piece.size], piece)
            return scratch

        result = load(parts[0], total)
        if arithmetic:
            for part in parts[1:]:
                arithmetic.combine(total, result, load(part, term))
                result = total
            if final:
                arithmetic.finish(total)
        if is_coded(out):
            if not whole:  # filled up with what does not make the step larger
                flat, count = result.reshape(-1), elements.stop - elements.start
                flat[count:] = flat[count - 1]
            self._encode(q, into, result, work, term, dice)
        elif not straight:
            self._convert(into, result.reshape(-1)[: into.size])

    def _convert(self, out: Array, x: Array) -> None:
        """One of the two is of float32."""
        if out.dtype == x.dtype or 8 in (out.itemsize, x.itemsize):
            np.copyto(out, x, casting="same_kind")
        else:
            self._kernels.convert(out, x)

    # --- one kind or the other ------------------------------------------------------------------------------------------

    def _decode(self, q: Quantization, out: Floats, records: Array) -> None:
        codes = records["codes"]
        if q.kind not in SCALED:
            self._kernels.convert(out.reshape(-1), codes.reshape(-1))
            return
        if q.kind == "uint4":
            np.copyto(out[:, : q.block // 2], codes & 15)
            np.copyto(out[:, q.block // 2 :], codes >> 4)
        else:
            np.copyto(out, codes)
        np.multiply(out, records["step"][:, None], out=out)
        if q.kind != "int8":
            np.add(out, records["low"][:, None], out=out)

    def _encode(self, q: Quantization, records: Array, x: Floats, work: Floats, spare: Floats, dice: np.random.PCG64 | None) -> None:
        """x may be the caller's and is only read; work and spare are scratch."""
        if q.kind not in SCALED:
            self._encode_float(q, records["codes"].reshape(-1), x.reshape(-1), work.reshape(-1), dice)
            return
        levels = _LEVELS[q.kind]
        low, high = np.minimum.reduce(x, axis=1), np.maximum.reduce(x, axis=1)
        span = np.maximum(high, -low) if q.kind == "int8" else high - low
        step, inverse = span / levels, levels / span
        closest = span < _NARROWEST
        step[closest] = inverse[closest] = 0
        np.copyto(step, np.nan, where=~(span < _WIDEST))
        if q.kind == "int8":
            np.multiply(x, inverse[:, None], out=work)
        else:
            np.copyto(low, np.nan, where=np.isnan(step))
            records["low"] = low
            np.subtract(x, low[:, None], out=work)
            np.multiply(work, inverse[:, None], out=work)
        records["step"] = step
        if dice:  # rounded to nearest after up to half a step more or less; never just half, which would be a tie for whole numbers
            np.copyto(spare, _draw(dice, x.size).reshape(x.shape))
            np.multiply(spare, np.float32(2.0**-16), out=spare)
            np.add(spare, np.float32(2.0**-17 - 0.5), out=spare)
            np.add(work, spare, out=work)
        np.add(work, _MAGIC, out=work)
        whole, codes = work.view(np.int32), records["codes"]
        if q.kind == "uint4":
            narrow = spare.view(np.uint8).reshape(-1)[: x.size].reshape(x.shape)
            np.copyto(narrow, whole, casting="unsafe")
            lower, upper = narrow[:, : q.block // 2], narrow[:, q.block // 2 :]
            np.left_shift(upper, 4, out=upper)
            np.bitwise_or(lower, upper, out=codes)
        else:
            np.copyto(codes, whole, casting="unsafe")

    def _encode_float(self, q: Quantization, codes: Array, x: Floats, work: Floats, dice: np.random.PCG64 | None) -> None:
        if not dice:
            self._kernels.convert(codes, x)
            return
        np.copyto(work, x)
        if has_nan(work):
            work[np.isnan(work)] = np.nan  # its low bits are 0: what is added to them does not overflow
        bits, chance = work.view(np.uint32), _draw(dice, x.size)
        if q.kind == "bfloat16":
            np.add(bits, chance, out=bits)
            np.right_shift(bits, 16, out=bits)
            np.copyto(codes.view(np.uint16), bits, casting="unsafe")
            return
        small = np.abs(x) < 2.0**-14  # subnormal: there the distance is the same everywhere
        np.add(bits, chance >> 3, out=bits)
        np.bitwise_and(bits, 0xFFFFE000, out=bits)
        if small.any():
            work[small] = np.floor(x[small] * np.float32(2.0**24) + chance[small] * np.float32(2.0**-16)) * np.float32(2.0**-24)
        self._kernels.convert(codes, work)

    def _dice(self, q: Quantization, draw: Draw) -> np.random.PCG64:
        """The generator, at the place of the first record: a number of it serves 4 elements."""
        self._bits.state = _beginning(q.seed, draw.rank, draw.nth)
        self._bits.advance(draw.at * block_of(q) // 4)
        return self._bits


@lru_cache(maxsize=256)
def _beginning(seed: int, rank: int, nth: int) -> Any:
    return np.random.PCG64(np.random.SeedSequence((seed, rank, nth))).state


def _draw(dice: np.random.PCG64, size: int) -> npt.NDArray[np.uint16]:
    """Numbers from 0 to 2**16 - 1; size is a multiple of 4."""
    drawn: npt.NDArray[np.uint64] = dice.random_raw(size // 4)
    return drawn.view(np.uint16)
