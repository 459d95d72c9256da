"""The teams that are compared: processes of their own for each face of pccl, for gloo, and for each MPI."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pccl
from pccl.tools.bench import mpi
from pccl.tools.bench.buffers import HALVES, REDUCING
from pccl.tools.bench.crew import Crew, Team, crew, launched

TeamOf = Callable[[int], AbstractAsyncContextManager[Team]]
"""Starts a team of so many."""
FACES = {"sync": "join", "async": "join_async"}
"""How a worker joins by each."""
OTHERS = {"gloo": "torch", **{name: f"{name} mpi4py" for name in mpi.MPIS}}
"""What pccl can be compared with, and what to install for it."""


@contextlib.asynccontextmanager
async def pccl_team(count: int, *, face: str = "sync", **settings: Any) -> AsyncIterator[Crew]:
    """A group with a master of its own.

    Args:
        settings: of `connect`.
    """
    async with pccl.Master() as master, crew(count) as team:
        await team.ask(FACES[face], address=master.address, peers=count, **settings)
        yield team


@contextlib.asynccontextmanager
async def gloo_team(count: int) -> AsyncIterator[Crew]:
    """A process group of torch.distributed's."""
    with tempfile.TemporaryDirectory(prefix="pccl-bench-") as folder:
        async with crew(count) as team:
            path = str(Path(folder) / "gloo")
            await asyncio.gather(*(worker.ask("join_gloo", path=path, rank=worker.number, peers=count) for worker in team.workers))
            yield team


@contextlib.asynccontextmanager
async def mpi_team(count: int, *, found: mpi.Installed) -> AsyncIterator[Team]:
    """The ranks that a launcher of MPI starts."""
    async with launched([*found.launcher, "-n", str(count)], count) as team:
        await team.ask("join_mpi", packages=found.packages)
        yield team


def other(name: str, prefix: Path, collective: str, dtype: str) -> TeamOf | str:
    """How to start a team of one of `OTHERS`; or why it cannot be compared.

    Args:
        prefix: the environment in which the MPIs are.
    """
    missing = f"{name} is left out: it is not installed (pip install {OTHERS[name]})"
    if name == "gloo":
        return gloo_team if importlib.util.find_spec("torch") else missing
    found = mpi.find(name, prefix)
    if found and dtype in HALVES and collective in REDUCING:
        return f"{name} is left out: it cannot reduce {dtype}"
    return functools.partial(mpi_team, found=found) if found else missing
