"""What a GPU's tensors cost: ``python -m tests.cuda.measure``. Two processes on this machine, over TCP on loopback, on one GPU.

By turns: tensors on the CPU; on the GPU; and on the GPU by hand, copied whole to and from memory that the caller has pinned. What the last
takes longer than the second is what the overlap of copies with the network gains. Medians, in ms, of the process that takes longer.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pccl
import pccl.sync

KINDS = ("cpu", "gpu", "by hand")


def turns(comm: Any, device: str, nbytes: int, how: dict[str, Any], out: bool) -> dict[str, Callable[[], None]]:
    """What is measured."""
    import torch

    count = nbytes // 4
    host, pinned = torch.ones(count), torch.empty(count, pin_memory=device != "cpu")
    here, x, there = torch.ones(count), torch.ones(count, device=device), torch.ones(count, device=device)

    def by_hand() -> None:
        pinned.copy_(x)
        comm.all_reduce(pinned, "avg", **how)
        (there if out else x).copy_(pinned)
        if device != "cpu":
            torch.cuda.synchronize()

    return {
        "cpu": lambda: comm.all_reduce(host, "avg", out=here if out else None, **how),
        "gpu": lambda: comm.all_reduce(x, "avg", out=there if out else None, **how),
        "by hand": by_hand,
    }


def peer(address: str, device: str, sizes: list[int], repeat: int, results: Any) -> None:
    """One of the two."""
    with pccl.sync.connect(address, min_world_size=2) as comm:
        for atomic in (True, False):
            for out in (False, True):
                for mib in sizes:
                    kinds = turns(comm, device, mib << 20, {"atomic": atomic}, out)
                    times: dict[str, list[float]] = {kind: [] for kind in kinds}
                    for turn in range(repeat + 2):
                        for kind in KINDS:
                            comm.barrier()
                            began = time.perf_counter()
                            kinds[kind]()
                            if turn > 1:
                                times[kind].append(time.perf_counter() - began)
                    results.put((atomic, out, mib, {kind: statistics.median(found) for kind, found in times.items()}))


async def main(device: str, sizes: list[int], repeat: int) -> None:
    """Start them, and print what they find."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    async with pccl.Master() as master:
        peers = [spawn.Process(target=peer, args=(master.address, device, sizes, repeat, results)) for _ in range(2)]
        for process in peers:
            process.start()
        for process in peers:
            await asyncio.to_thread(process.join)
    found: dict[Any, list[dict[str, float]]] = {}
    while not results.empty():
        atomic, out, mib, times = results.get()
        found.setdefault((atomic, out, mib), []).append(times)
    print(f"{'atomic':8}{'out of place':14}{'MiB':>6}" + "".join(f"{kind:>10}" for kind in KINDS))
    for (atomic, out, mib), both in found.items():
        print(f"{atomic!s:8}{out!s:14}{mib:6}" + "".join(f"{max(times[kind] for times in both) * 1e3:10.2f}" for kind in KINDS))
    if any(process.exitcode for process in peers):
        sys.exit("a process has failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="'cpu' tries the script where there is no GPU")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64, 256], help="MiB")
    parser.add_argument("--repeat", type=int, default=15)
    given = parser.parse_args()
    asyncio.run(main(given.device, given.sizes, given.repeat))
