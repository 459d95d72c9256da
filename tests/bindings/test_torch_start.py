"""How peers of a job meet: by its store, with a master in rank 0 or elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

import pccl  # noqa: E402
from pccl.bindings.torch import start as starting  # noqa: E402
from pccl.bindings.torch.start import MASTER, Started, start  # noqa: E402
from tests.checks.support import QUICK, master_thread  # noqa: E402


def meet(store: Any, size: int, **settings: Any) -> list[Started]:
    """A job's ranks, each in a thread."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: start(store, rank, size, QUICK | settings), range(size)))


def part(members: list[Started], *, leave: bool = True) -> None:
    with ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(lambda member: member.end(leave), members))


@pytest.mark.parametrize("leave", [True, False])
def test_ranks_are_those_of_the_job(leave: bool) -> None:
    """Twice with the same store."""
    store = dist.HashStore()
    for _ in range(2):
        members = meet(store, 3)
        assert [member.comm.rank for member in members] == [0, 1, 2]
        assert [m.name for m in members[0].comm.view.members] == ["rank 0", "rank 1", "rank 2"]
        part(members, leave=leave)


def test_hosts_that_are_not_one_talk_to_a_master_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["one host", "another"])
    addresses: list[str] = []
    connect = pccl.sync.connect

    def noted(address: str, **settings: Any) -> Any:
        addresses.append(address)
        return connect(address, **settings)

    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(starting, "host_identity", lambda: next(names))
    monkeypatch.setattr(starting.socket, "gethostname", lambda: "127.0.0.1")
    monkeypatch.setattr(starting.sync, "connect", noted)
    members = meet(dist.HashStore(), 2, listen="127.0.0.1", advertise="127.0.0.1")
    assert all("key=" in address for address in addresses)
    part(members)


def test_a_master_outside_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with master_thread() as address:
        monkeypatch.setenv(MASTER, address)
        jobs = [meet(dist.HashStore(), 2) for _ in range(2)]
        assert [[member.comm.world_size for member in members] for members in jobs] == [[2, 2], [2, 2]]
        for members in jobs:
            part(members)


def test_a_job_that_is_not_complete() -> None:
    """Rank 0 ends its master when it gives up."""
    store = dist.HashStore()
    store.set("pccl/1/host/1", starting.host_identity())
    with pytest.raises(pccl.ConnectError, match="min_world_size"):
        start(store, 0, 2, {"connect_timeout": 0.3})
