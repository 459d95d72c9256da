"""For the checks of shared state and of who is in: what goes over the wire, states to sync, masters in processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pccl.communicator import Communicator
from pccl.core.types import StateInfo
from pccl.transports.tcp import TcpWire
from tests.checks.support import each, join, outcomes

MIB = 1 << 20
State = dict[str, Any]


class WireCount:
    """Counts what this process writes to the sockets of its links, whoever asks for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._counts: list[int] = []  # appending is safe in all of the engines' threads
        write = TcpWire.write

        def counted(wire: TcpWire, buffers: Sequence[memoryview | bytes]) -> int:
            n = write(wire, buffers)
            self._counts.append(n)
            return n

        patch.setattr(TcpWire, "write", counted)

    def take(self) -> int:
        """Bytes since the last time."""
        counts, self._counts[:] = list(self._counts), []
        return sum(counts)


def tensor(nbytes: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Finite and different everywhere, so that no two blocks are alike."""
    return np.random.default_rng(seed).standard_normal(nbytes // 4, dtype=np.float32)


def copied(state: Mapping[str, Any]) -> State:
    """The same state in other memory."""
    return {name: v.copy() if isinstance(v, np.ndarray) else v for name, v in state.items()}


def bits(state: Mapping[str, Any]) -> dict[str, Any]:
    """What has to stay the same, or to become it."""
    return {name: (v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for name, v in state.items()}


@asynccontextmanager
async def newcomer(address: str, comms: Sequence[Communicator], **settings: Any) -> AsyncIterator[Communicator]:
    """A peer, N, that comes in by as many updates of the others as that takes; all of them are then between two calls."""

    async def updates(comm: Communicator) -> None:
        while comm.world_size == world:
            await comm.update()

    world = comms[0].world_size
    comm, *_ = await each([join(address, "N", world + 1, **settings), *(updates(c) for c in comms)])
    assert isinstance(comm, Communicator)
    try:
        yield comm
    finally:
        await comm.close()


async def sync(comms: Sequence[Communicator], states: Sequence[State], revision: int | Sequence[int] = 1, **how: Any) -> list[StateInfo]:
    """All of them sync; keywords are for all."""
    revisions = [revision] * len(comms) if isinstance(revision, int) else revision
    return await each(c.sync_state(s, revision=r, **how) for c, s, r in zip(comms, states, revisions, strict=True))


async def try_sync(comms: Sequence[Communicator], states: Sequence[State], each_how: Sequence[dict[str, Any]]) -> list[Any]:
    """All of them sync, each with keywords of its own; what each gets."""
    return await outcomes(c.sync_state(s, **how) for c, s, how in zip(comms, states, each_how, strict=True))
