"""What calls need besides time: memory at the peers, and the master's processor."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import pccl
from pccl.tools.bench.crew import ask_all, crew
from pccl.tools.bench.report import Report

MIB = 1 << 20
IDLE = 2.0
"""Seconds for which nothing but heartbeats is measured."""
CASES = ("in place", "out of place", "round")


async def memory(report: Report, peers: Sequence[int], size: int) -> None:
    """The peak of each peer beyond its tensors; every case in new processes."""
    for count in peers:
        for case in CASES:
            async with pccl.Master() as master, crew(count) as team:
                await team.ask("join", address=master.address, peers=count)
                found = await team.ask("memory", case=case, size=size)
            report.row(case=case, peers=count, size=size, extra=max(found) / MIB, least=min(found) / MIB)


async def master_cpu(report: Report, peers: Sequence[int], groups: int, rounds: int, processes: int) -> None:
    """The CPU time of a master that serves light peers."""
    for count in peers:
        async with crew(1 + processes) as team:
            server, *hosts = team.workers
            address = await server.ask("serve")
            size = count // groups
            before, began = await server.ask("used"), time.perf_counter()
            shares = [Counter(f"group {i % groups}" for i in range(k, size * groups, processes)) for k in range(processes)]
            joining = (host.ask("populate", address=address, groups=share, size=size) for host, share in zip(hosts, shares, strict=True))
            await asyncio.gather(*joining)
            joined, then = await server.ask("used"), time.perf_counter()
            await asyncio.sleep(IDLE)
            idle, start = await server.ask("used"), time.perf_counter()
            await ask_all(hosts, "commit", rounds=rounds)
            used, end = await server.ask("used"), time.perf_counter()
            peer_count = size * groups
            report.row(
                peers=peer_count,
                groups=groups,
                rounds=rounds,
                join_cpu=(joined - before) / peer_count * 1e6,
                join_seconds=then - began,
                idle_cpu=(idle - joined) / (peer_count * (start - then)) * 1e6,
                commit_cpu=(used - idle) / (peer_count * rounds) * 1e6,
                commit_seconds=end - start,
            )
