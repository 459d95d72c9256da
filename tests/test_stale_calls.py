"""Calls made by the membership that a caller knows, when the engine knows a newer one."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from pccl import CollectiveAborted
from pccl.calls import Part
from pccl.collectives.tensors import memory_of
from pccl.core.types import Epoch, Member, Pair, View
from pccl.route import Routes

HERE = tuple(Member(uid, f"peer {uid}", "here") for uid in range(3))
NOW = View(Epoch(1, 1, 2), 0, HERE, lost=(Member(3, "peer 3", "here"),), left=(Member(4, "peer 4", "here"),))


@pytest.mark.parametrize(
    "part",
    [
        Part("sendrecv", "sendrecv(int8[8])", x=memory_of(np.zeros(8, np.int8), "x"), out=None, pair=Pair(0, 3)),
        Part("broadcast", "broadcast(int8[8])", x=None, out=memory_of(np.zeros(8, np.int8), "x", write=True), root=3),
        Part("reduce_scatter", "reduce_scatter(int8[8])", x=memory_of(np.zeros(8, np.int8), "x"), out=None),
    ],
    ids=lambda part: part.collective,
)
def test_a_call_that_a_loss_has_overtaken_is_aborted_and_names_the_lost(part: Part) -> None:
    with pytest.raises(CollectiveAborted, match=r"no longer a member|cannot be shared out among 3 members") as caught:
        Routes(cast(Any, None)).find(part.ask, NOW, 0, (), part.description, local=False)
    assert caught.value.lost == ("peer 3",)
    assert caught.value.left == ("peer 4",)
    assert caught.value.survivors == ("peer 0", "peer 1", "peer 2")
