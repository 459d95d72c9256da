"""Checks 1 to 5: what collectives compute, and that it is the same on every peer. For quantization (3, 4) see test_quantized_calls."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pccl
from pccl.core.dtypes import DTYPES, LEGAL, premul_sum
from tests.checks import oracle
from tests.checks.support import admit, each, group, join

FLOATS = ("float16", "bfloat16", "float32", "float64")
ALGORITHMS = ("auto", "ring", "bidirectional_ring", "tree", "star", "direct", "halving_doubling", "hierarchical")
FACTORS = (0.5, 1.25, -3.0, 0.1, 7.0)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("name", DTYPES)
async def test_check_01_every_dtype_operator_and_count(name: str, world: int) -> None:
    dtype = DTYPES[name]
    operators = [op for op, dtypes in LEGAL.items() if name in dtypes]
    async with group(world) as comms:
        for count in sorted({1, world - 1, world, 1025, 1 << 20}):
            inputs = [oracle.values(name, count, (count, rank)) for rank in range(world)]
            outs, again = [np.empty_like(x) for x in inputs], [np.empty_like(x) for x in inputs]
            for op in operators:
                factors = FACTORS[:world] if op == "premul_sum" else ()
                ops = [premul_sum(f) for f in factors] or [op] * world
                for out in outs:
                    out.view(np.uint8)[:] = 85
                infos = await each(c.all_reduce(x, op, out=y) for c, x, y, op in zip(comms, inputs, outs, ops, strict=True))
                oracle.check(op, dtype, inputs, outs[0], algorithm=infos[0].algorithm, factors=factors)
                oracle.same_bits(outs)
                for x, y in zip(inputs, again, strict=True):
                    y[:] = x
                await each(c.all_reduce(y, op) for c, y, op in zip(comms, again, ops, strict=True))
                oracle.same_bits([outs[0], *again])
            for rank, x in enumerate(inputs):
                oracle.same_bits([x, oracle.values(name, count, (count, rank))])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_check_01_sizes_at_which_credits_matter(algorithm: str) -> None:
    """A call's share of what may be sent unasked is used up to the last byte, by one stream or by several together."""
    async with group(2) as two, group(4) as four:
        for count in (4080, 4096, 5003, 6144, 8180, 8192, 12_288, 24_576):
            for comms in (two, four):
                tensors = [np.full(count, rank + 1.0, np.float32) for rank in range(len(comms))]
                await each(c.all_reduce(x, algorithm=algorithm) for c, x in zip(comms, tensors, strict=True))
                assert all((x == (3.0 if comms is two else 10.0)).all() for x in tensors)


@pytest.mark.parametrize("name", [*FLOATS, "complex64"])
@pytest.mark.parametrize("count", [33, 70_001])
async def test_check_02_twenty_times_the_same_bits(name: str, count: int) -> None:
    """Sums whose bits depend on their order; in between other calls are under way, so that data arrives at other times."""
    rng = np.random.default_rng(2)
    inputs = [(rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4, count)).astype(DTYPES[name].numpy) for _ in range(4)]
    noise = [np.ones(40_000) for _ in range(4)]
    async with group(4) as comms:
        for algorithm in ALGORITHMS:
            seen = set()
            for turn in range(20):
                outs = [np.empty_like(x) for x in inputs]
                calls = [c.all_reduce(x, out=y, algorithm=algorithm) for c, x, y in zip(comms, inputs, outs, strict=True)]
                if turn % 2:
                    calls += [c.all_reduce(x, out=np.empty_like(x), tag="noise") for c, x in zip(comms, noise, strict=True)]
                    calls = calls[turn % len(calls) :] + calls[: turn % len(calls)]
                await each(calls)
                seen |= {y.tobytes() for y in outs}
            assert len(seen) == 1, f"{algorithm} gave {len(seen)} different results"
    orders = {sum(np.stack(p)[1:], np.stack(p)[0]).tobytes() for p in itertools.islice(itertools.permutations(inputs), 8)}
    assert len(orders) > 1, "the data does not tell orders apart"


INPUTS: dict[str, Any] = {
    "random": lambda rng, n: rng.standard_normal(n),
    "constant": lambda rng, n: np.full(n, 42.0),
    "negative": lambda rng, n: -rng.random(n),
    "mixed": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.integers(-4, 4, n),
    "zeros": lambda rng, n: rng.standard_normal(n) * rng.integers(0, 2, n),
}


@pytest.mark.parametrize("op", ["sum", "avg"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_check_03_sums_and_averages_without_quantization(op: str, algorithm: str) -> None:
    rng = np.random.default_rng(3)
    async with group(3) as comms:
        for name in FLOATS:
            for make in INPUTS.values():
                inputs = [make(rng, 5003).astype(DTYPES[name].numpy) for _ in comms]
                outs = [x.copy() for x in inputs]
                infos = await each(c.all_reduce(y, op, algorithm=algorithm) for c, y in zip(comms, outs, strict=True))
                oracle.same_bits(outs)
                oracle.check(op, DTYPES[name], inputs, outs[0], algorithm=infos[0].algorithm)
            outs = [np.full(777, value, DTYPES[name].numpy) for value in (42, 43, 0)]
            await each(c.all_reduce(y, op, algorithm=algorithm) for c, y in zip(comms, outs, strict=True))
            want = np.full(777, 85, DTYPES[name].numpy) if op == "sum" else np.full(777, np.float32(85) / np.float32(3), DTYPES[name].numpy)
            if op == "sum" or DTYPES[name].half or name == "float32":
                oracle.same_bits([want, *outs])


@pytest.mark.parametrize("name", [*FLOATS, "complex64", "complex128"])
@pytest.mark.parametrize("count", [64, 300_000])
async def test_check_04_nan_and_infinity(name: str, count: int) -> None:
    """One input has them: a NaN makes the element NaN, infinities add up as IEEE 754 says; all peers have the same bits; nothing warns."""
    dtype = DTYPES[name]
    special = np.array([np.nan, np.inf, -np.inf, -np.nan])
    where = np.arange(count)
    async with group(3) as comms:
        for op in [op for op, dtypes in LEGAL.items() if name in dtypes]:
            inputs = [np.full(count, 1.5, dtype.numpy) for _ in comms]
            inputs[1][:] = special[where % 4].astype(dtype.numpy)
            inputs[2][where % 8 == 1] = -np.inf
            outs = [x.copy() for x in inputs]
            used = premul_sum(2.0) if op == "premul_sum" else op
            await each(c.all_reduce(y, used) for c, y in zip(comms, outs, strict=True))
            oracle.same_bits(outs)
            got = outs[0]
            assert np.isnan(got[where % 4 == 0]).all()
            assert np.isnan(got[where % 4 == 3]).all()
            if dtype.kind == "complex":
                assert not np.isfinite(got[where % 8 == 5]).any()
                continue
            expected = {"min": (-np.inf, 1.5, -np.inf), "max": (np.inf, np.inf, 1.5), "prod": (-np.inf, np.inf, -np.inf)}
            both, plus, minus = expected.get(op, (np.nan, np.inf, -np.inf))
            for remainder, want in ((1, both), (5, plus), (2, minus), (6, minus)):
                np.testing.assert_array_equal(got[where % 8 == remainder].astype(np.float64), want)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
async def test_check_05_half_floats_are_reduced_and_shared(kind: str) -> None:
    async with pccl.Master() as master:
        comms = await each(join(master.address, f"P{k}", 2) for k in range(2))
        rng = np.random.default_rng(5)
        bits = {name: rng.integers(0, 1 << 16, 100_003).astype(np.uint16) for name in ("float16", "bfloat16")}  # NaNs and all

        def state(filled: bool) -> dict[str, Any]:
            made: dict[str, Any] = {}
            for name, content in bits.items():
                raw = content.copy() if filled else np.zeros_like(content)
                if kind == "torch":
                    torch = pytest.importorskip("torch")
                    made[name] = torch.from_numpy(raw.view(np.int16)).view(getattr(torch, name))
                else:
                    made[name] = raw.view(np.float16 if name == "float16" else ml_dtypes.bfloat16)
            return made

        def content(x: Any) -> bytes:
            if kind == "torch":
                import torch

                x = x.view(torch.int16).numpy()
            return bytes(x.tobytes())

        try:
            olds = [state(True), state(True)]
            infos = await each(c.sync_state(s, revision=1) for c, s in zip(comms, olds, strict=True))
            assert [i.bytes_received for i in infos] == [0, 0]
            comms.append(await admit(master.address, comms, "late"))
            new = state(False)
            infos = await each(c.sync_state(s, revision=r) for c, s, r in zip(comms, [*olds, new], (1, 1, 0), strict=True))
            assert len({i.digest for i in infos}) == 1
            assert infos[2].bytes_received >= 2 * 200_006
            for name, raw in bits.items():
                for s in (*olds, new):
                    assert content(s[name]) == raw.tobytes()
            for name in bits:
                tensors = [state(False)[name] for _ in comms]
                for k, x in enumerate(tensors):
                    x[:] = k + 0.5
                await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
                assert all(float(x[k]) == 4.5 for x in tensors for k in (0, 50_000, 100_002))
        finally:
            await asyncio.gather(*(c.close() for c in comms))
