"""Quantized collectives between peers: the same bits on all, errors within the documented bounds, bytes as documented."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pccl
from pccl.collectives import planner
from pccl.communicator import Communicator
from pccl.core.dtypes import DTYPES
from pccl.core.quantization import KINDS, SCALED
from tests.checks.oracle import STEPS, UNIT, same_bits
from tests.checks.oracle import encoding_error as encoding
from tests.checks.support import each, group, in_threads, outcomes

Array = npt.NDArray[Any]

ALGORITHMS = ("auto", "star", "ring", "bidirectional_ring", "tree", "halving_doubling", "spanning_tree")


def data(count: int, rank: int, dtype: str = "float32") -> Array:
    return (np.random.default_rng([count, rank]).standard_normal(count) + 0.25).astype(DTYPES[dtype].numpy)


def within(error: Array, bound: Array) -> None:
    """Fail unless no error is larger than its bound."""
    worst = int(np.argmax(error - bound))
    assert error[worst] <= bound[worst], f"element {worst} is off by {error[worst]:.3g}, which may be {bound[worst]:.3g}"


async def reduced(comms: list[Communicator], inputs: list[Array], op: Any = "sum", **how: Any) -> tuple[Array, list[pccl.Info]]:
    """The result of an all_reduce, which is the same everywhere; inputs stay what they are."""
    outs = [np.full_like(x, 7) for x in inputs]
    infos = await each(c.all_reduce(x, op, out=y, **how) for c, x, y in zip(comms, inputs, outs, strict=True))
    same_bits(outs)
    return outs[0], infos


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
async def test_sums_are_within_their_bound_and_the_same_everywhere(world: int) -> None:
    """Where each value is quantized twice at most: what the others give, and the result."""
    async with group(world) as comms:
        for count, kind, rounding in itertools.product((0, 1, 1000, 5003, 300_001), KINDS, ("nearest", "stochastic")):
            q = pccl.Quantization(kind, rounding=rounding)
            inputs = [data(count, rank) for rank in range(world)]
            for algorithm in ("auto", "star"):
                got, infos = await reduced(comms, inputs, quantize=q, algorithm=algorithm)
                exact = np.sum([x.astype(np.float64) for x in inputs], axis=0)
                if world == 1 or not count:
                    same_bits([got, inputs[0]])
                    continue
                size = np.sum([abs(x.astype(np.float64)) for x in inputs], axis=0)
                given = np.sum([encoding(q, x) for x in inputs], axis=0)
                # the block of the result may be wider than that of the exact sum, by as much as its elements are off
                result = encoding(q, exact) + 2 * given.max() / (STEPS[kind] if kind in SCALED else 1 / UNIT[kind])
                within(abs(got - exact), 1.001 * (given + result + world * UNIT["float32"] * size))
                assert all(info.algorithm == ("star" if algorithm == "star" else "direct") for info in infos)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_the_error_grows_with_the_partial_sums_where_these_travel(algorithm: str) -> None:
    world, count = 5, 40_001
    async with group(world) as comms:
        for kind in KINDS:
            q = pccl.Quantization(kind, block=64)
            inputs = [data(count, rank) for rank in range(world)]
            got, _ = await reduced(comms, inputs, quantize=q, algorithm=algorithm)
            widest = max(
                float(encoding(q, np.sum(some, axis=0)).max()) for k in range(1, world + 1) for some in itertools.combinations(inputs, k)
            )
            assert abs(got - np.sum(inputs, axis=0, dtype=np.float64)).max() <= 2 * (world - 1) * widest * 1.1


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("op", ["sum", "avg", "min", "max"])
async def test_operators_and_dtypes(name: str, op: str) -> None:
    async with group(3) as comms:
        inputs = [data(3001, rank, name) for rank in range(3)]
        wide = [x.astype(np.float64) for x in inputs]
        exact = {"sum": sum(wide), "avg": sum(wide) / 3, "min": np.min(wide, axis=0), "max": np.max(wide, axis=0)}[op]
        for kind in KINDS:
            got, _ = await reduced(comms, inputs, op, quantize=kind)
            q = pccl.Quantization(kind)
            errors = [encoding(q, x).max() for x in wide]
            most = {"sum": sum(errors), "avg": sum(errors) / 3, "min": max(errors), "max": max(errors)}[op]
            assert abs(got.astype(np.float64) - exact).max() <= 1.1 * (most + encoding(q, exact).max()) + 2 * UNIT[name] * abs(exact).max()


async def test_premul_sum() -> None:
    async with group(2) as comms:
        inputs = [data(3000, rank) for rank in range(2)]
        outs = [np.empty_like(x) for x in inputs]
        ops = [pccl.premul_sum(2), pccl.premul_sum(-1)]
        await each(c.all_reduce(x, op, out=y, quantize="float16") for c, x, y, op in zip(comms, inputs, outs, ops, strict=True))
        same_bits(outs)
        assert abs(outs[0] - (2 * inputs[0] - inputs[1])).max() < 0.01


async def test_where_elements_are_elsewhere_than_in_one_array() -> None:
    """Not contiguous, and several in a list: as if they had been copied, in place and into another tensor."""
    async with group(3) as comms:
        inputs = [data(6000, rank) for rank in range(3)]
        want, _ = await reduced(comms, inputs, quantize="uint8")
        strided = [np.zeros((6000, 2), np.float32) for _ in inputs]
        for s, x in zip(strided, inputs, strict=True):
            s[:, 0] = x
        await each(c.all_reduce(s[:, 0], quantize="uint8") for c, s in zip(comms, strided, strict=True))
        assert all((s[:, 0] == want).all() and not s[:, 1].any() for s in strided)
        lists = [[x[:100].copy(), x[100:].copy()] for x in inputs]
        await each(c.all_reduce(parts, quantize="uint8") for c, parts in zip(comms, lists, strict=True))
        same_bits([want, *(np.concatenate(parts) for parts in lists)])
        same = [x.copy() for x in inputs]
        await each(c.all_reduce(x, quantize="uint8", atomic=False) for c, x in zip(comms, same, strict=True))
        same_bits([want, *same])


async def test_the_other_collectives() -> None:
    world, q = 3, pccl.Quantization("uint8", block=64)
    async with group(world) as comms:
        for count in (1, 700, 100_000):
            inputs = [data(count * world, rank) for rank in range(world)]
            for algorithm in ("auto", "ring", "spanning_tree"):
                infos = await each(c.reduce_scatter(x, quantize=q, algorithm=algorithm) for c, x in zip(comms, inputs, strict=True))
                got = np.concatenate([info.out for info in infos])
                assert abs(got - np.sum(inputs, axis=0)).max() < 0.15
                parts = [x[:count] for x in inputs]
                infos = await each(c.all_gather(x, quantize=q, algorithm=algorithm) for c, x in zip(comms, parts, strict=True))
                same_bits([info.out for info in infos])
                for row, part in zip(infos[0].out, parts, strict=True):
                    within(abs(row - part.astype(np.float64)), encoding(q, part))
            wholes = [np.zeros(count * world, np.float32) for _ in inputs]
            for whole, part, rank in zip(wholes, parts, range(world), strict=True):
                whole[rank * count : (rank + 1) * count] = part
            await each(c.all_gather(whole[c.rank * count :][:count], out=whole, quantize=q) for c, whole in zip(comms, wholes, strict=True))
            same_bits([*wholes, np.concatenate(list(infos[0].out))])
            for algorithm in ("auto", "direct", "tree", "ring", "spanning_tree"):
                given = [x.copy() for x in inputs]
                await each(c.broadcast(x, 1, quantize=q, algorithm=algorithm) for c, x in zip(comms, given, strict=True))
                same_bits(given)
                within(abs(given[1] - inputs[1].astype(np.float64)), encoding(q, inputs[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["auto", "ring"])
async def test_nan_and_infinity_have_the_same_outcome_everywhere(kind: str, algorithm: str) -> None:
    async with group(3) as comms:
        inputs = [data(3000, rank) for rank in range(3)]
        clean, _ = await reduced(comms, inputs, quantize=kind, algorithm=algorithm)
        inputs[0][5], inputs[1][600], inputs[2][1300], inputs[2][2999] = np.nan, np.inf, -np.inf, 3e38
        got, _ = await reduced(comms, inputs, quantize=kind, algorithm=algorithm)
        places = np.array([5, 600, 1300, 2999])
        if kind in SCALED:
            spoilt = np.isin(np.arange(3000) // 512, places // 512)
            assert np.isnan(got[spoilt]).all()
        else:
            spoilt = np.isin(np.arange(3000), places)
            last = np.inf if kind == "float16" else 3e38
            np.testing.assert_allclose(got[places], [np.nan, np.inf, -np.inf, last], rtol=0.01)
        same_bits([got[~spoilt], clean[~spoilt]])


# --- again, and on the wire ----------------------------------------------------------------------------------------


async def test_a_call_that_is_repeated_gives_the_same_bits_unless_its_seed_is_another() -> None:
    async with group(4) as comms:
        inputs = [data(200_000, rank) for rank in range(4)]
        for algorithm in ("auto", "ring", "tree"):
            seen = set()
            for seed, turn in itertools.product((1, 2), range(5)):
                q = pccl.Quantization("uint4", rounding="stochastic", seed=seed)
                noise = [c.all_reduce(np.ones(40_000), tag="noise") for c in comms] if turn % 2 else []
                outs = [np.empty_like(x) for x in inputs]
                calls = [
                    c.all_reduce(x, out=y, quantize=q, algorithm=algorithm, atomic=turn > 1)
                    for c, x, y in zip(comms, inputs, outs, strict=True)
                ]
                await each([*noise, *calls])
                seen |= {(seed, y.tobytes()) for y in outs}
            assert len(seen) == 2
            assert len({bits for _, bits in seen}) == 2


async def test_equal_inputs_are_not_rounded_alike_by_all() -> None:
    """Else the errors of n ranks would add up to n times that of one, and not to the square root of n times."""
    x, q = data(200_000, 0), pccl.Quantization("uint4", rounding="stochastic")
    async with group(4) as comms:
        gathered = (await each(c.all_gather(x, quantize=q) for c in comms))[0].out
        errors = gathered.astype(np.float64) - x
        apart = np.corrcoef(errors) - np.eye(4)
        assert abs(apart).max() < 5 / np.sqrt(x.size)


@pytest.mark.parametrize(("kind", "share"), [("uint8", 3.9), ("int8", 3.9), ("uint4", 7.7), ("bfloat16", 1.99), ("float16", 1.99)])
async def test_what_is_saved_on_the_wire(kind: str, share: float) -> None:
    for world in (2, 4):
        async with group(world) as comms:
            inputs = [data(1_000_000, rank) for rank in range(world)]
            _, plain = await reduced(comms, inputs, algorithm="direct")
            _, coded = await reduced(comms, inputs, quantize=kind)
            for a, b in zip(plain, coded, strict=True):
                assert a.bytes_sent > share * b.bytes_sent
                assert a.bytes_received > share * b.bytes_received


@pytest.mark.parametrize("algorithm", ["auto", "star", "ring", "tree", "halving_doubling", "spanning_tree"])
async def test_tensors_that_are_larger_than_the_window(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What relays hold back for others does not keep them from taking more in."""
    for module in ("pccl.calls", planner.__name__):
        monkeypatch.setattr(f"{module}.WINDOW", 1 << 18)
    async with group(4) as comms:
        inputs = [np.full(4_000_000, 1.0 + rank, np.float32) for rank in range(4)]
        got, _ = await reduced(comms, inputs, quantize=pccl.Quantization("float16"), algorithm=algorithm)
        assert (got == 10).all()
        parts = [x[:1_000_000] for x in inputs]
        for name in ("auto", "ring", "doubling", "spanning_tree"):
            infos = await each(c.all_gather(x, quantize="float16", algorithm=name) for c, x in zip(comms, parts, strict=True))
            assert all((info.out == np.arange(1, 5)[:, None]).all() for info in infos)


# --- how it is asked for -------------------------------------------------------------------------------------------


def test_the_blocking_face_and_rounds() -> None:
    def body(comm: pccl.sync.Communicator) -> list[Array]:
        tensors = [data(20_000, comm.rank) for _ in range(3)]
        comm.all_reduce(tensors[0], quantize="int8")
        with comm.round(retry=True) as r:
            r.all_reduce(tensors[1], quantize="int8")
            r.all_reduce(tensors[2])
        return tensors

    results = in_threads(3, body)
    for one, two, three in results:
        same_bits([one, two, results[0][0]])
        same_bits([three, results[0][2]])
    assert abs(results[0][0] - results[0][2]).max() < 0.2


def said(how: dict[str, Any]) -> str:
    """What the description of a call ends with."""
    q = how.get("quantize")
    return f", quantize={pccl.Quantization(q) if isinstance(q, str) else q})" if q else ")"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"quantize": "uint8"}, {}),
        ({"quantize": "uint8"}, {"quantize": "int8"}),
        ({"quantize": "uint8"}, {"quantize": pccl.Quantization("uint8", block=64)}),
        ({"quantize": "uint8"}, {"quantize": pccl.Quantization("uint8", rounding="stochastic")}),
        (
            {"quantize": pccl.Quantization("int8", rounding="stochastic")},
            {"quantize": pccl.Quantization("int8", rounding="stochastic", seed=1)},
        ),
    ],
)
@pytest.mark.parametrize("count", [40, 100_000])
async def test_members_that_quantize_otherwise(one: dict[str, Any], other: dict[str, Any], count: int) -> None:
    async with group(2) as comms:
        inputs = [data(count, rank) for rank in range(2)]
        found = await outcomes(c.all_reduce(x, **how) for c, x, how in zip(comms, inputs, (one, other), strict=True))
        for error in found:
            assert isinstance(error, pccl.CollectiveMismatch)
            assert {call.partition("sum")[2] for call in error.calls.values()} == {said(one), said(other)}
        same_bits([inputs[0], data(count, 0)])
        same_bits([inputs[1], data(count, 1)])


@pytest.mark.parametrize(
    ("x", "how", "says"),
    [
        (np.ones(3), {"quantize": "int2"}, "quantize: 'int2' is no kind of quantization"),
        (np.ones(3), {"quantize": 8}, "quantize: one of uint8, .* or None is needed, not 8"),
        (np.ones(3, np.int32), {"quantize": "uint8"}, "quantize: it is for float16, .*; x is int32"),
        (np.ones(3, np.complex64), {"quantize": "uint8"}, "x is complex64"),
        (np.ones(3), {"quantize": "uint8", "op": "prod"}, "quantize: errors of 'prod' have no bound"),
        (np.ones(3, np.float16), {"quantize": "uint8", "accumulate": "float32"}, "give quantize or accumulate"),
    ],
)
async def test_what_is_refused(x: Array, how: dict[str, Any], says: str) -> None:
    async with group(1) as comms:
        with pytest.raises(pccl.InvalidArgument, match=says):
            await comms[0].all_reduce(x, **how)


async def test_a_root_is_written_to() -> None:
    async with group(1) as comms:
        x = np.ones(3)
        x.flags.writeable = False
        with pytest.raises(pccl.InvalidArgument, match="x: a read-only"):
            await comms[0].broadcast(x, quantize="uint8")
