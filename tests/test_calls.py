"""Calls before they move anything."""

from __future__ import annotations

import numpy as np
import pytest

from pccl.calls import Part
from pccl.collectives.tensors import memory_of
from pccl.core.types import Epoch, Member, View

VIEW = View(Epoch(1, 1, 1), 0, tuple(Member(uid, f"peer {uid}", "here") for uid in range(3)))


@pytest.mark.parametrize(
    ("collective", "given", "got", "fits"),
    [
        ("all_to_all", 6, 6, True),
        ("all_to_all", 7, 7, False),
        ("reduce_scatter", 6, 2, True),
        ("reduce_scatter", 6, 6, False),
        ("all_gather", 2, 6, True),
        ("all_gather", 2, 4, False),
    ],
)
def test_buffers_of_the_right_size_fit_the_membership(collective: str, given: int, got: int, fits: bool) -> None:
    x, out = memory_of(np.zeros(given), "x"), memory_of(np.zeros(got), "out", write=True)
    assert (Part(collective, collective, x=x, out=out).misfit(VIEW) == "") is fits
