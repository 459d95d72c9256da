"""Calls before they move anything."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import pccl
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


async def test_a_round_that_has_ended_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pccl.Master() as master, pccl.connect(master.address) as comm:
        engine, spares = comm._runtime.engine, []
        give = engine.spare

        def spare(nbytes: int) -> npt.NDArray[Any]:
            found = give(nbytes)
            spares.append(weakref.ref(found))
            return found

        monkeypatch.setattr(engine, "spare", spare)
        async with comm.round() as calls:
            pending = [calls.all_reduce(np.ones(1000)) for _ in range(3)]
        assert [call.info.world_size for call in pending] == [1, 1, 1]
        gc.collect()
        assert len(spares) == 3
        assert len([ref for ref in spares if ref() is not None]) == 1  # the engine keeps one for the next call
