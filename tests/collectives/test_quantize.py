"""Codes, records and their arithmetic against bounds worked out in float64, and against the same done step by step."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pccl.calls import Reduction
from pccl.collectives.quantize import CHUNK, Codec, Draw, block_of, record_type
from pccl.collectives.reduction import Kernels
from pccl.core.dtypes import DTYPES, ReduceOp
from pccl.core.errors import InvalidArgument
from pccl.core.quantization import KINDS, SCALED, Quantization
from tests.checks.oracle import encoding_error

Array = npt.NDArray[Any]

CODEC = Codec(Kernels())
DRAW = Draw(0, 0, 0)
NAN = np.float32(np.nan).view(np.uint32)
ALL = [Quantization(kind, block=32, rounding=rounding, seed=5) for kind in KINDS for rounding in ("nearest", "stochastic")]
every = pytest.mark.parametrize("q", ALL, ids=str)


def encoded(q: Quantization, x: Array, draw: Draw = DRAW) -> Array:
    records = np.zeros(-(-x.size // block_of(q)), record_type(q))
    CODEC.encode(q, records, x, draw)
    return records


def decoded(q: Quantization, records: Array, size: int, dtype: Any = np.float32) -> Array:
    out = np.full(size, 7, dtype)
    CODEC.decode(q, out, records)
    return out


def there_and_back(q: Quantization, x: Array) -> Array:
    return decoded(q, encoded(q, x), x.size, x.dtype)


def near(q: Quantization, x: Array) -> None:
    """Fail unless x comes back as near as is promised; x is float32."""
    error = abs(there_and_back(q, x).astype(np.float64) - x)
    worst = int(np.argmax(error - encoding_error(q, x)))
    assert error[worst] <= encoding_error(q, x)[worst], f"{q}: {x[worst]} became {there_and_back(q, x)[worst]}"


# --- what is left of an element -------------------------------------------------------------------------------------


@every
@settings(deadline=None)
@given(data=st.data())
def test_the_error_is_bounded(q: Quantization, data: st.DataObject) -> None:
    """Elements of one size and of very different ones, subnormal ones, blocks that lack elements."""
    largest = 60000.0 if q.kind == "float16" else 2.0**125
    floats = st.floats(-largest, largest, width=32)
    x = np.array(data.draw(st.lists(st.one_of(floats, st.floats(-8, 8, width=32)), min_size=1, max_size=100)), np.float32)
    near(q, x * np.float32(2.0) ** data.draw(st.integers(-140, 0)))


@every
@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, CHUNK, CHUNK + 1, 2 * CHUNK + 33])
def test_the_error_is_bounded_at_every_size(q: Quantization, size: int) -> None:
    rng = np.random.default_rng(size)
    near(q, (rng.standard_normal(size) * 10 ** rng.uniform(-3, 3, size)).astype(np.float32))


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", [16, 48, 512, 1 << 14])
def test_the_error_is_bounded_for_blocks_of_every_size(kind: str, rounding: str, block: int) -> None:
    q = Quantization(kind, block=block, rounding=rounding)
    near(q, np.random.default_rng(block).standard_normal(3 * block + 7).astype(np.float32) + 100)


@every
def test_nothing_makes_nothing(q: Quantization) -> None:
    assert there_and_back(q, np.empty(0, np.float32)).size == 0


@every
@pytest.mark.parametrize("value", [0.0, 0.375, -1.5])
def test_zeros_and_small_fractions_are_exact(q: Quantization, value: float) -> None:
    """Where all of a block is alike; but for int8, whose steps have 0 in the middle."""
    x = np.full(100, value, np.float32)
    if q.kind != "int8" or value == 0:
        np.testing.assert_array_equal(there_and_back(q, x), x)


@pytest.mark.parametrize("kind", ["uint8", "uint4"])
def test_the_least_element_of_a_block_is_exact(kind: str) -> None:
    for rounding in ("nearest", "stochastic"):
        q = Quantization(kind, block=16, rounding=rounding)
        x = np.random.default_rng(3).standard_normal(4096).astype(np.float32)
        least = x.reshape(-1, 16).argmin(axis=1) + np.arange(0, 4096, 16)
        np.testing.assert_array_equal(there_and_back(q, x)[least], x[least])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_floats_are_rounded_as_numpy_and_ml_dtypes_do(kind: str) -> None:
    bits = np.random.default_rng(4).integers(0, 1 << 32, 100_000, np.uint32)
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(np.float16 if kind == "float16" else ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(there_and_back(Quantization(kind), x), want)


@every
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_other_floats_go_by_way_of_float32(q: Quantization, name: str) -> None:
    x = np.random.default_rng(6).standard_normal(777).astype(DTYPES[name].numpy)
    same = encoded(q, x.astype(np.float32))
    assert encoded(q, x).tobytes() == same.tobytes()
    want = decoded(q, same, 777).astype(x.dtype)
    assert there_and_back(q, x).tobytes() == want.tobytes()


# --- NaN and infinity -----------------------------------------------------------------------------------------------


@every
@settings(deadline=None)
@given(
    places=st.lists(st.integers(0, 99), min_size=1, max_size=3),
    wrong=st.sampled_from([np.inf, -np.inf, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]),
)
def test_what_is_not_finite(q: Quantization, places: list[int], wrong: float | int) -> None:
    x = np.linspace(-2, 3, 100, dtype=np.float32)
    clean = there_and_back(q, x)
    bad = np.uint32(wrong).view(np.float32) if isinstance(wrong, int) else np.float32(wrong)
    x[places] = bad
    got = there_and_back(q, x)
    if q.kind in SCALED:
        spoilt = np.isin(np.arange(100) // q.block, np.array(places) // q.block)
        assert (got.view(np.uint32)[spoilt] == NAN).all()
    else:
        spoilt = np.isin(np.arange(100), places)
        want = np.float32(wrong) if np.isinf(bad) else np.float32(np.nan)
        assert (got[spoilt].view(np.uint32) == want.view(np.uint32)).all()
    np.testing.assert_array_equal(got[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("kind", SCALED)
def test_a_block_that_spans_more_than_a_float_can_step_through(kind: str) -> None:
    q = Quantization(kind, block=16)
    x = np.zeros(48, np.float32)
    x[3], x[20] = 2.0**127, np.nextafter(np.float32(2.0**127), np.float32(0))
    got = there_and_back(q, x)
    assert np.isnan(got[:16]).all()
    assert np.isfinite(got[16:]).all()


@pytest.mark.parametrize("kind", SCALED)
def test_a_block_that_hardly_spans_anything(kind: str) -> None:
    x = np.array([2.0**-119, 2.0**-149] * 8, np.float32)
    got = there_and_back(Quantization(kind, block=16), x)
    assert (abs(got - x) <= 2.0**-118).all()


# --- reductions -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("op", ["sum", "avg", "min", "max"])
@pytest.mark.parametrize("size", [1, 40, 2 * CHUNK + 33])
def test_a_fold_is_what_its_steps_are(q: Quantization, op: str, size: int) -> None:
    """Of plain and coded parts, into plain and coded memory, into new memory and into that of a part."""
    rng = np.random.default_rng(size)
    parts = [rng.standard_normal(size).astype(np.float32) for _ in range(4)]
    mixed = [encoded(q, x, Draw(r, 0, 0)) if r != 1 else x for r, x in enumerate(parts)]
    given = [decoded(q, x, size) if x.dtype.names else x for x in mixed]
    total = given[0].copy()
    for x in given[1:]:
        total = {"sum": np.add, "avg": np.add, "min": np.minimum, "max": np.maximum}[op](total, x)
    if op == "avg":
        total = total / np.float32(4)
    arithmetic = Reduction(Kernels(), ReduceOp(op), 4, everywhere=False)
    plain, coded, draw = np.empty(size, np.float32), np.zeros_like(mixed[0]), Draw(2, 1, 8)
    CODEC.fold(q, arithmetic, plain, mixed, True, size, draw)
    np.testing.assert_array_equal(plain, total)
    CODEC.fold(q, arithmetic, coded, mixed, True, size, draw)
    assert coded.tobytes() == encoded(q, total, draw).tobytes()
    CODEC.fold(q, arithmetic, mixed[0], mixed, True, size, draw)
    assert mixed[0].tobytes() == coded.tobytes()


# --- chance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chance_depends_on_the_place_and_not_on_how_the_work_is_cut(kind: str) -> None:
    q = Quantization(kind, block=32, rounding="stochastic", seed=9)
    x = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    whole, block = encoded(q, x), block_of(q)
    for cut in (1, 7, 60):
        assert encoded(q, x[cut * block :], Draw(0, 0, cut)).tobytes() == whole[cut:].tobytes()
    assert encoded(q, x).tobytes() == whole.tobytes()
    for other, draw in ((q, Draw(1, 0, 0)), (q, Draw(0, 1, 0)), (Quantization(kind, block=32, rounding="stochastic", seed=10), DRAW)):
        assert encoded(other, x, draw).tobytes() != whole.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_fair(kind: str) -> None:
    """The mean error of many is as far from 0 as chance has it; errors of different ranks have nothing to do with each other."""
    size = 1 << 18
    q = Quantization(kind, rounding="stochastic", seed=1)
    x = np.random.default_rng(2).uniform(-1, 1, size).astype(np.float32)
    x[:1000] *= np.float32(2.0**-16)  # subnormal in float16
    errors = [decoded(q, encoded(q, x, Draw(rank, 0, 0)), size).astype(np.float64) - x for rank in range(2)]
    for places in (slice(0, 512), slice(512, None), np.flatnonzero(x > 0.9), np.flatnonzero(x < -0.9)):
        for error in errors:
            part = error[places]
            assert abs(part.mean()) < 5 * part.std() / np.sqrt(part.size)
    assert abs(np.corrcoef(*errors)[0, 1]) < 5 / np.sqrt(size)


# --- what a caller may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "int2"}, "'int2' is no kind of quantization; there are uint8"),
        ({"kind": "uint8", "block": 0}, "block: an integer from 16 to 16384"),
        ({"kind": "uint8", "block": 40}, "block: a multiple of 16"),
        ({"kind": "uint8", "block": True}, "block: an integer"),
        ({"kind": "uint8", "rounding": "up"}, "rounding: 'up' is none; there are nearest, stochastic"),
        ({"kind": "uint8", "seed": -1}, "seed: an integer from 0"),
        ({"kind": "uint8", "seed": 1.0}, "seed: an integer from 0"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        Quantization(**arguments)


def test_what_a_quantization_is_called() -> None:
    assert str(Quantization("uint8")) == "uint8(block=512)"
    assert str(Quantization("bfloat16", rounding="stochastic", seed=3)) == "bfloat16(stochastic, seed=3)"


@pytest.mark.parametrize(("kind", "nbytes"), [("uint8", 520), ("int8", 516), ("uint4", 264), ("bfloat16", 1024), ("float16", 1024)])
def test_what_512_elements_take(kind: str, nbytes: int) -> None:
    q = Quantization(kind)
    assert encoded(q, np.ones(512, np.float32)).nbytes == nbytes
