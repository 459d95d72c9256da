"""Arguments that no message could carry are refused where they are given, not where a call would then hang for them."""

from __future__ import annotations

import numpy as np
import pytest

import pccl
from tests.checks.support import each, group

TAGS = [1 << 63, -(1 << 63) - 1, 1 << 70, "\ud800", "x" * 257, True, 1.0, b"x"]


async def test_tags_that_cannot_be_sent_are_refused_and_others_are_not() -> None:
    async with group(2) as comms:
        for tag in TAGS:
            for comm in comms:
                with pytest.raises(pccl.InvalidArgument, match="tag: an integer of 64 bits"):
                    await comm.all_reduce(np.ones(1), tag=tag)  # type: ignore[arg-type]
        for tag in ((1 << 63) - 1, -(1 << 63), "é" * 256, "", 0):
            tensors = [np.ones(1) for _ in comms]
            await each(comm.all_reduce(x, tag=tag) for comm, x in zip(comms, tensors, strict=True))
            assert all(x == 2 for x in tensors)


@pytest.mark.parametrize("colors", [(1 << 63, 0), (True, 0), (0, 1 << 63), (0, None)])
async def test_colors_and_keys_that_cannot_be_sent_are_refused(colors: tuple[int, int]) -> None:
    async with group(1) as (comm,):
        with pytest.raises(pccl.InvalidArgument, match="an integer of 64 bits"):
            await comm.split(colors[0], key=colors[1])
        half = await comm.split((1 << 63) - 1, key=-(1 << 63))
        assert half is not None
        assert half.world_size == 1
