"""The kernels against an oracle that works on one Python number after the other."""

import math
import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.collectives import halves, reduction
from pccl.collectives.reduction import Kernels
from pccl.core.dtypes import DTYPES, LEGAL, DType, ReduceOp, premul_sum, reduce_op

Array = npt.NDArray[Any]

PAIRS = [(dtype, op) for op, dtypes in LEGAL.items() for dtype in DTYPES if dtype in dtypes]
LENGTHS = [0, 1, 7, 1025]


@pytest.fixture(params=["whole", "chunks"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """With chunks as they are, and with tiny ones, so that short arrays have many."""
    if request.param == "chunks":
        monkeypatch.setattr(reduction, "CHUNK_BYTES", 256)
        monkeypatch.setattr(halves, "CHUNK", 24)
        monkeypatch.setattr(halves, "_FEW", 8)
    return Kernels()


@pytest.fixture(params=["numpy", "torch"])
def helper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who converts float16."""
    if request.param == "torch":
        pytest.importorskip("torch")
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    return str(request.param)


# --- the oracle ---------------------------------------------------------------------------------------------------------


def round_bfloat16(x: float) -> float:
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    if math.isnan(x):
        return x
    low, high = bits & 0xFFFF, bits >> 16
    high += low > 0x8000 or (low == 0x8000 and high & 1)
    return float(struct.unpack("<f", struct.pack("<I", high << 16))[0])


def round_struct(code: str) -> Callable[[float], float]:
    def rounded(x: float) -> float:
        try:
            return float(struct.unpack(code, struct.pack(code, x))[0])
        except OverflowError:
            return math.copysign(math.inf, x)

    return rounded


ROUND: dict[str, Callable[[float], float]] = {
    "float16": round_struct("<e"),
    "bfloat16": round_bfloat16,
    "float32": round_struct("<f"),
    "float64": lambda x: x,
}
"""A Python float to the nearest of the type. Sums, products and quotients of two float32 may be rounded to float64 before."""


def one_float(op: str, a: float, b: float, rounded: Callable[[float], float]) -> float:
    if op in ("min", "max"):
        if math.isnan(a) or math.isnan(b):
            return math.nan
        return min(a, b) if op == "min" else max(a, b)
    return rounded(a * b if op == "prod" else a + b)


def one(op: str, dtype: DType, a: Any, b: Any) -> Any:
    if dtype.kind == "bool":
        return {"band": a and b, "bor": a or b, "bxor": a != b, "min": a and b, "max": a or b}[op]
    if dtype.kind in ("int", "uint"):
        exact = {
            "sum": lambda: a + b,
            "prod": lambda: a * b,
            "min": lambda: min(a, b),
            "max": lambda: max(a, b),
            "band": lambda: a & b,
            "bor": lambda: a | b,
            "bxor": lambda: a ^ b,
        }[op]()
        bits = 8 * dtype.itemsize
        wrapped = exact % (1 << bits)
        return wrapped - (1 << bits) if dtype.kind == "int" and wrapped >> (bits - 1) else wrapped
    if dtype.kind == "complex":
        r = ROUND[f"float{4 * dtype.itemsize}"]
        if op == "prod":
            return complex(r(r(a.real * b.real) - r(a.imag * b.imag)), r(r(a.real * b.imag) + r(a.imag * b.real)))
        return complex(r(a.real + b.real), r(a.imag + b.imag))
    return one_float(op, a, b, ROUND["float32" if dtype.half else dtype.name])


def reference(op: str, dtype: DType, parts: list[Array], divide_by: int = 1) -> Array:
    """What `fold` gives."""
    columns = zip(*[part.astype(np.float32).tolist() if dtype.half else part.tolist() for part in parts], strict=True)
    results = []
    for first, *rest in columns:
        total = first
        for term in rest:
            total = one(op, dtype, total, term)
        if dtype.kind == "complex":
            r = ROUND[f"float{4 * dtype.itemsize}"]
            total = complex(r(total.real / divide_by), r(total.imag / divide_by))
        elif dtype.kind == "float":
            total = ROUND["float32" if dtype.half else dtype.name](total / divide_by)
            total = ROUND[dtype.name](total)
            if op in ("min", "max") and total == 0:
                total = 0.0
        results.append(total)
    out = np.array(results, dtype.numpy) if results else np.zeros(0, dtype.numpy)
    with np.errstate(all="ignore"):
        return canonical(out)


def canonical(x: Array) -> Array:
    reals = x.view(x.real.dtype) if x.dtype.kind == "c" else x
    if reals.dtype.kind not in "iub":
        quiet = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000, "float64": 0x7FF8 << 48}[reals.dtype.name]
        reals.view(f"u{reals.itemsize}")[np.isnan(reals)] = quiet
    return x


def as_doubles(a: Array, b: Array) -> None:
    with np.errstate(all="ignore"):
        if a.dtype.kind not in "iub":
            a, b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_array_equal(a, b)


def same_bits(a: Array, b: Array) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


# --- inputs ------------------------------------------------------------------------------------------------------------

SPECIAL = {
    "float16": [6e-8, 6.1e-5, 65504, 2048, 2049],
    "bfloat16": [1e-40, 3.3e38, 256, 257],
    "float32": [1e-45, 3.4e38, 16777216, 1.0000001],
    "float64": [5e-324, 1.7e308, 9007199254740992.0, 1.0000000000000002],
}


def values(dtype: DType, n: int, seed: int) -> Array:
    """Random ones, among them the extremes, infinities, zeros of both signs and NaNs of all kinds."""
    rng = np.random.default_rng([seed, n])
    if dtype.kind == "bool":
        return rng.integers(0, 2, n).astype(bool)
    if dtype.kind in ("int", "uint"):
        info = np.iinfo(dtype.numpy)
        x = rng.integers(info.min, info.max, n, dtype.numpy, endpoint=True)
        small = rng.integers(0, 4, n).astype(dtype.numpy)
        return np.where(rng.random(n) < 0.3, small, x)
    if dtype.kind == "complex":
        real = DTYPES[f"float{4 * dtype.itemsize}"]
        return values(real, 2 * n, seed).view(dtype.numpy)
    x = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 4, n)).astype(dtype.numpy)
    extremes = [*SPECIAL[dtype.name], 0.0, 1.0, math.inf, math.nan]
    with np.errstate(all="ignore"):
        odd = np.array(extremes + [-e for e in extremes], np.float64).astype(dtype.numpy)
    x = np.where(rng.random(n) < 0.3, rng.choice(odd, n), x)
    raw = rng.integers(0, 1 << 63, n, np.uint64).astype(f"u{dtype.itemsize}").view(dtype.numpy)  # NaNs with payloads
    return np.where(rng.random(n) < 0.1, raw, x).astype(dtype.numpy)


def operator(op: str, dtype: str, factor: float = 0.3) -> ReduceOp:
    return reduce_op(premul_sum(factor) if op == "premul_sum" else op, DTYPES[dtype])


def unaligned(x: Array) -> Array:
    """A copy one byte off."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    shifted = raw[1:].view(x.dtype)
    shifted[:] = x
    return shifted


# --- fold and combine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_fold(name: str, op: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    check_fold(name, op, kernels)


@pytest.mark.parametrize("op", [op for name, op in PAIRS if name == "float16"])
def test_fold_with_torch(op: str, kernels: Kernels) -> None:
    pytest.importorskip("torch")
    check_fold("float16", op, kernels)


def check_fold(name: str, op: str, kernels: Kernels) -> None:
    dtype = DTYPES[name]
    for n in LENGTHS:
        for count in (1, 2, 4) if n < 1000 else (3,):
            divide_by = count if op == "avg" else 1
            parts = [values(dtype, n, seed) for seed in range(count)]
            want = reference(op, dtype, parts, divide_by)
            out = np.empty_like(parts[0])
            kernels.fold(operator(op, name), out, parts, divide_by=divide_by)
            same_bits(out, want)
            for i in range(count):
                again = [part.copy() for part in parts]
                kernels.fold(operator(op, name), again[i], again, divide_by=divide_by)
                same_bits(again[i], want)
                for j in range(count):
                    if j != i:
                        same_bits(again[j], parts[j])


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_combine(name: str, op: str, kernels: Kernels) -> None:
    dtype = DTYPES[name]
    for n in LENGTHS:
        a, b = values(dtype, n, 5), values(dtype, n, 6)
        want = reference(op, dtype, [a, b])
        for case in ("out", "first", "second", "unaligned"):
            x, y = (unaligned(a), unaligned(b)) if case == "unaligned" else (a.copy(), b.copy())
            out = {"out": np.empty_like(a), "first": x, "second": y, "unaligned": unaligned(a)}[case]
            kernels.combine(operator(op, name), out, x, y)
            if op in ("min", "max"):
                as_doubles(out, want)  # either zero will do
            else:
                same_bits(canonical(out.copy()), want)


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_an_operation_on_one_array(name: str, op: str, kernels: Kernels) -> None:
    x = values(DTYPES[name], 100, 1)
    want = reference(op, DTYPES[name], [x, x])
    kernels.fold(operator(op, name), x, [x, x])
    same_bits(x, want)


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_place_and_alignment_do_not_matter(name: str, op: str) -> None:
    dtype = DTYPES[name]
    parts = [values(dtype, 3001, seed) for seed in range(3)]
    want = np.empty_like(parts[0])
    Kernels().fold(operator(op, name), want, parts)
    for low in (1, 5, 17, 3000):
        out = np.empty_like(want[low:])
        Kernels().fold(operator(op, name), out, [part[low:] for part in parts])
        same_bits(out, want[low:])
        shifted = unaligned(out)
        Kernels().fold(operator(op, name), shifted, [unaligned(part[low:]) for part in parts])
        same_bits(shifted.copy(), want[low:])


@pytest.mark.parametrize("name", ["float32", "float64", "int64", "uint8", "complex128"])
def test_fold_is_repeated_combine(name: str) -> None:
    dtype = DTYPES[name]
    parts = [values(dtype, 300_001 if dtype.itemsize == 1 else 70_001, seed) for seed in range(4)]
    kernels, out, total = Kernels(), np.empty_like(parts[0]), parts[0].copy()
    kernels.fold(operator("prod", name), out, parts)
    for part in parts[1:]:
        kernels.combine(operator("prod", name), total, total, part)
    same_bits(out, canonical(total))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_halves_are_rounded_once(name: str) -> None:
    dtype = DTYPES[name]
    ulp = 2.0**-10 if name == "float16" else 2.0**-7
    third = np.full(5, ulp / 3, np.float64).astype(dtype.numpy)
    parts = [np.ones(5, dtype.numpy), third, third, third]
    kernels, once, each = Kernels(), np.empty(5, dtype.numpy), np.ones(5, dtype.numpy)
    kernels.fold(operator("sum", name), once, parts)
    assert once.astype(float).tolist() == [1 + ulp] * 5
    for part in parts[1:]:
        kernels.combine(operator("sum", name), each, each, part)
    assert each.astype(float).tolist() == [1.0] * 5


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_average_of_halves_is_rounded_after_it_is_divided(name: str) -> None:
    dtype = DTYPES[name]
    big = np.full(4, 60000 if name == "float16" else 3e38, np.float64).astype(dtype.numpy)
    out = np.empty_like(big)
    if name == "float16":  # the sum is beyond float16, but not beyond float32
        Kernels().fold(operator("avg", name), out, [big] * 3, divide_by=3)
        same_bits(out, big)
    Kernels().fold(operator("avg", name), out, [big] * 3)
    assert np.isinf(out.astype(float)).all()


def test_zeros_of_both_signs() -> None:
    minus = np.array([0.0, -0.0, -0.0], np.float32)
    plus = np.array([-0.0, 0.0, -0.0], np.float32)
    for op in ("min", "max"):
        out = np.empty(3, np.float32)
        Kernels().fold(operator(op, "float32"), out, [minus, plus])
        same_bits(out, np.zeros(3, np.float32))
    Kernels().fold(operator("sum", "float32"), out, [minus, plus])
    assert np.signbit(out).tolist() == [False, False, True]


@pytest.mark.parametrize(("name", "op"), [(n, o) for n, o in PAIRS if DTYPES[n].kind == "float"])
def test_one_nan(name: str, op: str) -> None:
    dtype = DTYPES[name]
    width = 8 * dtype.itemsize
    infinity = int(np.array([np.inf]).astype(dtype.numpy).view(f"u{dtype.itemsize}")[0])
    for bits in (infinity + 1, (1 << width) - 1, (1 << (width - 1)) - 1, (1 << (width - 1)) + infinity + 1):
        parts = [np.ones(20_000, dtype.numpy) for _ in range(3)]
        parts[1].view(f"u{dtype.itemsize}")[12_345] = bits
        out = np.empty_like(parts[0])
        Kernels().fold(operator(op, name), out, parts)
        assert np.flatnonzero(out != 3 if op in ("sum", "avg", "premul_sum") else out != 1).tolist() == [12_345]
        assert np.isnan(out[12_345])
        same_bits(out, canonical(out.copy()))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_nans_may_be_left_as_they_are(name: str) -> None:
    x = np.array([1, 2, 3], DTYPES[name].numpy)
    x.view(f"u{x.itemsize}")[1] = odd = (1 << (8 * x.itemsize)) - 1
    out = np.empty_like(x)
    Kernels().fold(operator("min", name), out, [x], canonical=False)
    assert out.view(f"u{x.itemsize}")[1] == odd
    assert (out[0], out[2]) == (1, 3)


def test_nan_from_numbers_is_the_quiet_one() -> None:
    inf = np.array([np.inf, -np.inf], np.float32)
    out = np.empty(2, np.float32)
    Kernels().fold(operator("sum", "float32"), out, [inf, -inf])
    assert out.view(np.uint32).tolist() == [0x7FC00000] * 2


# --- prepare and finish --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LEGAL["premul_sum"]))
def test_premul(name: str, kernels: Kernels) -> None:
    dtype, factor = DTYPES[name], 0.3
    x = values(dtype, 1025, 3)
    if dtype.kind == "complex":
        r = ROUND[f"float{4 * dtype.itemsize}"]
        scaled = [complex(r(v.real * r(factor)), r(v.imag * r(factor))) for v in x.tolist()]
    else:
        wide = ROUND["float32" if dtype.half else name]
        scaled = [ROUND[name](wide(v * wide(factor))) for v in x.astype(np.float32 if dtype.half else x.dtype).tolist()]
    with np.errstate(all="ignore"):
        want = canonical(np.array(scaled, dtype.numpy))
    out = np.empty_like(x)
    kernels.prepare(operator("premul_sum", name), out, x)
    same_bits(canonical(out.copy()), want)
    kernels.prepare(operator("premul_sum", name), x, x)
    same_bits(x, out)


def test_a_factor_beyond_the_dtype() -> None:
    x = np.array([1, -1, 0], np.float32)
    Kernels().prepare(operator("premul_sum", "float32", 1e300), x, x)
    np.testing.assert_array_equal(x, [np.inf, -np.inf, np.nan])


@pytest.mark.parametrize(("name", "op"), [pair for pair in PAIRS if pair[1] != "premul_sum"])
def test_others_are_prepared_as_they_are(name: str, op: str) -> None:
    x = values(DTYPES[name], 33, 3)
    out, before = np.empty_like(x), x.copy()
    Kernels().prepare(operator(op, name), out, x)
    Kernels().prepare(operator(op, name), x, x)
    same_bits(out, before)
    same_bits(x, before)


@pytest.mark.parametrize(("name", "op"), PAIRS)
def test_finish(name: str, op: str, kernels: Kernels) -> None:
    x = values(DTYPES[name], 1025, 4)
    want = reference("sum", DTYPES[name], [x], 3) if op == "avg" else x.copy()
    alone = x.copy()
    kernels.finish(operator(op, name), alone, 1)
    same_bits(alone, x)
    kernels.finish(operator(op, name), x, 3)
    same_bits(canonical(x) if op == "avg" else x, want)


# --- halves --------------------------------------------------------------------------------------------------------------


def all_halves(name: str) -> Array:
    return np.arange(1 << 16, dtype=np.uint16).view(DTYPES[name].numpy)


def is_finite(x: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.isfinite(x)


@pytest.fixture
def _always_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_FEW", 0)


@pytest.mark.usefixtures("_always_fast")
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_widen(name: str, helper: str) -> None:
    x = all_halves(name)
    finite = x[is_finite(x)]  # apart, since chunks with others are converted in another way
    for chosen in (finite, x):
        out = np.empty(chosen.size, np.float32)
        Kernels().convert(out, chosen)
        if name == "float16":
            want = np.array([struct.unpack("<e", struct.pack("<H", bits))[0] for bits in chosen.view(np.uint16).tolist()], np.float32)
        else:
            want = (chosen.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        same_bits(canonical(out), canonical(want))


@pytest.mark.usefixtures("_always_fast")
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow(name: str, helper: str) -> None:
    dtype = DTYPES[name]
    x = all_halves(name)
    wide = np.sort(x[is_finite(x)].astype(np.float32))
    ties = ((wide[1:].astype(np.float64) + wide[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 20_000, np.uint32).view(np.float32)
    for case in (wide, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)), random, random[:1]):
        before, out = case.copy(), np.empty(case.size, dtype.numpy)
        Kernels().convert(out, case)
        same_bits(case, before)
        with np.errstate(all="ignore"):
            same_bits(out, canonical(case.astype(dtype.numpy)))
        some = slice(None, None, 97)
        assert out[some].astype(float).tolist() == pytest.approx([ROUND[name](v) for v in case[some].tolist()], abs=0, rel=0, nan_ok=True)


@pytest.mark.usefixtures("_always_fast")
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@given(x=st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_narrow_any(name: str, x: list[float]) -> None:
    out = np.empty(len(x), DTYPES[name].numpy)
    halves.Halves().narrow(out, np.array(x, np.float32))
    want = canonical(np.array([ROUND[name](v) for v in x], np.float32).astype(out.dtype))
    same_bits(out, want)


def test_widening_and_narrowing_what_is_not_aligned(helper: str) -> None:
    x = np.linspace(-9, 9, 5000).astype(np.float16)
    wide = unaligned(np.zeros(5000, np.float32))
    Kernels().convert(wide, unaligned(x))
    same_bits(wide.copy(), x.astype(np.float32))
    back = unaligned(np.zeros(5000, np.float16))
    Kernels().convert(back, wide)
    same_bits(back.copy(), x)


def test_parts_may_be_read_only(helper: str) -> None:
    parts = [np.full(5000, 1.5, np.float16), np.full(5000, 2.0, np.float16)]
    for part in parts:
        part.flags.writeable = False
    out = np.empty(5000, np.float16)
    Kernels().fold(operator("sum", "float16"), out, parts)
    assert (out == 3.5).all()


def test_torch_modes_of_the_caller_see_nothing() -> None:
    torch = pytest.importorskip("torch")
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            pytest.fail("seen")

    class Function(TorchFunctionMode):
        def __torch_function__(self, *args: Any, **kwargs: Any) -> Any:
            pytest.fail("seen")

    x, out, kernels = np.full(5000, 1.5, np.float16), np.empty(5000, np.float16), Kernels()
    for mode in (
        Dispatch(),  # type: ignore[no-untyped-call]
        Function(),
        torch.inference_mode(),
        torch.device("meta"),
    ):
        with mode:
            kernels.combine(operator("sum", "float16"), out, x, x)
        assert (out == 3).all()
        kernels.combine(operator("sum", "float16"), out, x, x)


# --- cost ----------------------------------------------------------------------------------------------------------------


def test_scratch_is_bounded_and_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    kernels = Kernels()
    cases = []
    for name, op in PAIRS:
        parts = [np.ones((1 << 20) // DTYPES[name].itemsize, DTYPES[name].numpy) for _ in range(3)]
        cases.append((operator(op, name), parts))
    tracemalloc.start()
    try:
        for operation, parts in cases:
            kernels.fold(operation, parts[0], parts)
            kernels.combine(operation, parts[0], parts[0], parts[1])
            kernels.prepare(operation, parts[0], parts[0])
            kernels.finish(operation, parts[0], 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
