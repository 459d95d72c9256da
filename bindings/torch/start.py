"""How the peers of a torch job find each other: rank 0 has the master, unless ``PCCL_MASTER`` names one, and the job's store says where."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pccl import sync
from pccl.connection import default_advertise, host_identity
from pccl.core.address import Address, is_loopback
from pccl.embedded import MasterThread

MASTER = "PCCL_MASTER"
"""Environment variable with the address of a master outside of the job"""
PATIENCE = 3.0
"""Seconds that rank 0 waits for the others to leave before it ends the master"""


class Started(NamedTuple):
    """What a peer has in hand."""

    comm: sync.Communicator
    """Whose ranks are the job's"""
    end: Callable[[bool], None]
    """To be called when the group is not needed any more: whether to leave it, or to go at once"""


def start(store: Any, rank: int, size: int, settings: Mapping[str, Any]) -> Started:
    """Join the others of a job; returns when all have come.

    Args:
        store: a `torch.distributed.Store` that all share.
        settings: as for `pccl.sync.connect`.

    Raises:
        ConnectError: not all have come in time.
    """
    turn = store.add(f"pccl/{rank}", 1)  # a store may serve several groups, one after the other
    here = f"pccl/{turn}"
    store.set(f"{here}/host/{rank}", host_identity())
    master: MasterThread | None = None
    whole: sync.Communicator | None = None
    if rank == 0:
        address = os.environ.get(MASTER)
        if not address:
            hosts = {store.get(f"{here}/host/{other}") for other in range(size)}
            master = _master(everywhere=len(hosts) > 1)
            address = master.address
        store.set(f"{here}/master", json.dumps([address, f"torch-{uuid.uuid4()}"]))
    try:
        address, group = json.loads(store.get(f"{here}/master"))
        whole = sync.connect(address, group=group, **{"name": f"rank {rank}", **settings, "min_world_size": size})
        comm = whole.split(0, key=rank)  # those who connect are ranked as they come
        assert comm is not None
    except BaseException:
        if whole:
            whole.close()
        if master:
            master.close()
        raise

    def end(leave: bool) -> None:
        (whole.leave if leave else whole.close)()
        if master:
            master.close(PATIENCE if leave else 0.0)

    return Started(comm, end)


def _master(*, everywhere: bool) -> MasterThread:
    """One of this process. Off this host it takes a key, which is part of its address, to talk to it."""
    if not everywhere:
        return MasterThread()
    from pccl.transports.keys import new_keypair

    listen = "0.0.0.0", None
    known = os.environ.get("MASTER_ADDR", "")
    found = None if not known or is_loopback(known) else default_advertise(Address(known, 1), listen)
    return MasterThread(listen="0.0.0.0:0", key=new_keypair(), advertise=found[0] if found else socket.gethostname())
