"""Calls that are larger than the window of a stream."""

from __future__ import annotations

import numpy as np
import pytest

from pccl.collectives.planner import WINDOW
from tests.checks.support import each, group


@pytest.mark.parametrize("algorithm", ["ring", "direct", "tree"])
@pytest.mark.parametrize("nbytes", [WINDOW * 9 // 8, WINDOW * 13 // 8])
async def test_the_last_part_of_a_window_is_granted_however_small(algorithm: str, nbytes: int) -> None:
    async with group(2) as comms:
        tensors = [np.full(nbytes // 4, 1.0 + k, np.float32) for k in range(2)]
        await each(comm.all_reduce(x, algorithm=algorithm) for comm, x in zip(comms, tensors, strict=True))
        assert all((x == 3).all() for x in tensors)
