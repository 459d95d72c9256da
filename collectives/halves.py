"""float16 and bfloat16 to float32 and back, a chunk at a time.

The bits are the same whoever does the work: widening is exact (a NaN becomes some NaN), narrowing rounds to nearest, ties to even,
and makes every NaN the one quiet NaN. ml_dtypes converts bfloat16 with vector instructions. numpy converts float16 one by one: twice
as fast is the arithmetic below, and ten times as fast is torch, which is used if the caller has loaded it anyway.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

CHUNK = 1 << 14
"""Elements that are converted at once; what a chunk needs stays in the cache, and torch does not split it over threads."""

_FEW = 2048  # numpy converts fewer float16 sooner than it makes the calls of the other ways

_SIGN = np.uint32(0x8000)
_EXPONENT = np.uint32(0x7F800000)
_SMALLEST = np.uint32(113 << 23)  # 2**-14, the smallest normal float16
_BEYOND = np.float32(65536)  # rounds to infinity


def has_nan(x: Array) -> bool:
    """Whether there is a NaN in floats of any type, at least one. The minimum is faster than `isnan`, which writes its answers."""
    lowest = np.minimum.reduce(x)
    return bool(lowest != lowest)


class Halves:
    """Converts. It holds the scratch, so it belongs to one thread. Arrays are flat, of one length from 1 to CHUNK."""

    def __init__(self) -> None:
        self._bits: npt.NDArray[np.uint16] | None = None
        self._rows: list[npt.NDArray[np.uint32]] = []

    def widen(self, out: Floats, x: Array) -> None:
        """``out = x``, exactly; x is float16 or bfloat16."""
        if x.dtype.char != "e" or x.size < _FEW:
            np.copyto(out, x)
        elif (torch := _torch(out, x)) is not None:
            torch.from_numpy(out).copy_(torch.from_numpy(x))
        else:
            self._widen_float16(out, x)

    def narrow(self, out: Array, x: Floats) -> None:
        """``out = x``, rounded; out is float16 or bfloat16. x is used up."""
        nans = np.isnan(x) if has_nan(x) else None
        if out.dtype.char != "e" or x.size < _FEW:
            np.copyto(out, x, casting="unsafe")
        elif (torch := _torch(out, x)) is not None:
            torch.from_numpy(out).copy_(torch.from_numpy(x))
        else:
            self._narrow_float16(out, x)
        if nans is not None:
            out.view(np.uint16)[nans] = 0x7E00 if out.dtype.char == "e" else 0x7FC0

    def _widen_float16(self, out: Floats, x: Array) -> None:
        if self._bits is None:
            self._bits = np.empty(CHUNK, np.uint16)
        bits = self._bits[: x.size]
        np.bitwise_and(x.view(np.uint16), 0x7FFF, out=bits)
        if np.maximum.reduce(bits) >= 0x7C00:  # infinities and NaNs: the arithmetic does not know them
            np.copyto(out, x)
            return
        # The fields in their places, though with an exponent that is 112 too small; subnormals come right with it.
        raw = out.view(np.int32)
        np.copyto(raw, x.view(np.int16))
        np.left_shift(raw, 13, out=raw)
        np.bitwise_and(out.view(np.uint32), np.uint32(0x8FFFE000), out=out.view(np.uint32))  # of the sign's copies keep one
        np.multiply(out, np.float32(2.0**112), out=out)

    def _narrow_float16(self, out: Array, x: Floats) -> None:
        # For x of exponent e (at least -14) the floats from 2**(e + 13) on are as far apart as float16's around x: added to that
        # power of two, x is rounded by the processor, and the sum's low bits are x in units of float16's last place, u (2048 for 1.0,
        # fewer for subnormals). Its exponent has e; float16's bits are u + ((e + 14) << 10). The constant of all this, modulo 2**16
        # as all that leads to a uint16, is 0x800, and is put into the low bits of the power of two.
        if not self._rows:
            self._rows = [np.empty(CHUNK, np.uint32) for _ in range(4)]
            self._rows[2][:] = _BEYOND.view(np.uint32)  # arrays, since numpy's minimum and maximum are slow with scalars
            self._rows[3][:] = _SMALLEST
        sign, size, beyond, smallest = [row[: x.size] for row in self._rows]
        magnitude, power = size.view(np.float32), x.view(np.uint32)
        np.right_shift(power, np.uint32(16), out=sign)
        np.bitwise_and(sign, _SIGN, out=sign)
        np.absolute(x, out=magnitude)
        np.minimum(magnitude, beyond.view(np.float32), out=magnitude)
        np.bitwise_and(size, _EXPONENT, out=power)
        np.maximum(power, smallest, out=power)
        np.add(power, np.uint32((13 << 23) + 0x800), out=power)
        np.add(magnitude, x, out=magnitude)
        np.add(sign, size, out=sign)
        np.right_shift(size, np.uint32(13), out=size)
        np.add(sign, size, out=sign)
        np.copyto(out.view(np.uint16), sign, casting="unsafe")


def _torch(*arrays: Array) -> Any:
    """torch, if it is loaded and can take these arrays without a warning and without anybody looking over its shoulder."""
    torch = sys.modules.get("torch")
    if torch is None or not all(array.flags.behaved for array in arrays):  # writable and aligned
        return None
    try:
        modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    except AttributeError:  # another version, or it is just being imported
        return None
    return None if modes else torch
