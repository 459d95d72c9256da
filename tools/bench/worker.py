"""A process of a benchmark: ``python -m pccl.tools.bench.worker``.

Its parent gives it orders, one JSON object per line, and hears what comes of each.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import pccl
from pccl.tools.bench.buffers import Buffers
from pccl.tools.bench.systems import AsyncPccl, Gloo, How, Mpi, Pccl, System
from pccl.tools.cli import FAILED, exit_code
from pccl.tools.parent import Parent

PAUSE = 0.001
"""Seconds between two updates of a member that is waiting for a change."""
CALL_TIMEOUT = 120.0

State = dict[str, npt.NDArray[np.float32]]


class Orders:
    """What a worker can be told to do: every public method, by its name. Results go back as JSON.

    Args:
        say: tells something before the result is there.
    """

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._comm: pccl.sync.Communicator
        self._system: System | None = None
        self._buffers: Buffers

    def finish(self) -> None:
        """Leave."""
        if self._system:
            self._system.close()

    # --- membership -------------------------------------------------------------------------------------------------

    def join(self, address: str, peers: int, **settings: Any) -> None:
        """Join the group and wait until it has so many members."""
        self._comm = pccl.sync.connect(address, timeout=CALL_TIMEOUT, **settings)
        self.gather(peers)
        self._system = Pccl(self._comm)

    def join_async(self, address: str, peers: int, **settings: Any) -> None:
        """Join a group of so many members by the asynchronous face."""
        self._system = AsyncPccl(address, peers, timeout=CALL_TIMEOUT, **settings)

    def join_gloo(self, path: str, rank: int, peers: int) -> None:
        """Make a gloo process group with others, which meet in a file."""
        self._system = Gloo(path, rank, peers, CALL_TIMEOUT)

    def join_mpi(self, packages: str) -> None:
        """Be a rank of the MPI whose launcher has started this process."""
        self._system = Mpi(packages)

    def gather(self, peers: int) -> None:
        """Update until the group has so many members: all of them see that in the same update."""
        while self._comm.world_size != peers:
            self._comm.update()
            if self._comm.world_size != peers:
                time.sleep(PAUSE)

    def admit(self) -> None:
        """Update until a newcomer is in."""
        while not self._comm.update().joined:
            time.sleep(PAUSE)

    # --- calls ------------------------------------------------------------------------------------------------------

    def prepare(self, collective: str, size: int, dtype: str, op: str, root: int) -> dict[str, int]:
        """Make buffers for a collective; the result says how large they are: at least the size, and divisible among the members."""
        assert self._system
        self._buffers = Buffers(collective, size, dtype, op, root, self._system.rank, self._system.world)
        return {"size": self._buffers.nbytes, "count": self._buffers.count}

    def check(self, how: How) -> int:
        """Make a call; the result is the number of elements that are wrong."""
        assert self._system
        self._buffers.fill()
        self._system.run(self._buffers, how, 1)
        return self._buffers.wrong(out_of_place="out" in how, quantize=how.get("quantize"))

    def run(self, how: How, count: int) -> dict[str, Any]:
        """Make so many calls; see `System`."""
        assert self._system
        self._buffers.clear()
        return self._system.run(self._buffers, how, count)

    def strike(self, value: float) -> dict[str, Any]:
        """Make a call in which somebody is to die, and a second one if that fails."""
        x = self._buffers.x
        x.fill(value)
        self._comm.barrier(atomic=False)
        self._say("entered", at=time.monotonic())
        found: dict[str, Any] = {"raised": None, "retried": None, "lost": 0}
        try:
            self._comm.all_reduce(x)
        except pccl.CollectiveAborted as e:
            found["raised"], found["lost"] = time.monotonic(), len(e.lost)
            self._comm.all_reduce(x)
            found["retried"] = time.monotonic() - found["raised"]
        found["low"], found["high"] = float(x.min()), float(x.max())
        return found

    # --- newcomers --------------------------------------------------------------------------------------------------

    def host(self, visits: int, size: int) -> None:
        """Let newcomers in and out again; give each of them the state if there is any."""
        alone, state = self._comm.world_size, make_state(size)
        came = 0
        while came < visits or self._comm.world_size != alone:
            joined = self._comm.update().joined  # one may come in the update in which the one before leaves
            came += len(joined)
            if joined and state:
                self._comm.sync_state(state, revision=1)
            if not joined:
                time.sleep(PAUSE)

    def visit(self, address: str, visits: int, size: int) -> dict[str, list[float]]:
        """Come as a newcomer, fetch the state if there is any, and leave, several times."""
        mine, right = {name: np.empty_like(x) for name, x in make_state(size).items()}, make_state(size)
        took: dict[str, list[float]] = {"connect": [], "fetch": []}
        for _ in range(visits):
            for x in mine.values():
                x.fill(0)
            began = time.perf_counter()
            comm = pccl.sync.connect(address, timeout=CALL_TIMEOUT)
            took["connect"].append(time.perf_counter() - began)
            if mine:
                began = time.perf_counter()
                comm.sync_state(mine, revision=0)
                took["fetch"].append(time.perf_counter() - began)
                if any(not np.array_equal(mine[name], right[name]) for name in right):
                    raise AssertionError("sync_state did not bring what the holders have")
            comm.leave()
        return took

    def agree(self, size: int, count: int) -> list[float]:
        """Synchronise a state that is the same on all members, so many times."""
        state, times = make_state(size), []
        for _ in range(count + 1):
            self._comm.barrier(atomic=False)
            began = time.perf_counter()
            self._comm.sync_state(state, revision=1)
            times.append(time.perf_counter() - began)
        return times[1:]

    # --- costs ------------------------------------------------------------------------------------------------------

    def memory(self, case: str, size: int) -> int:
        """How many bytes more than its tensors this process holds at its peak, in three calls of a kind."""
        parts = 4 if case == "round" else 1
        tensors = [_touched(size // parts) for _ in range(parts)]
        out = _touched(size) if case == "out of place" else None
        self._comm.all_reduce(np.zeros(1024, np.float32))
        before = _forget_peak()
        for _ in range(3):
            if case == "round":
                with self._comm.round() as calls:
                    for x in tensors:
                        calls.all_reduce(x)
            else:
                self._comm.all_reduce(tensors[0], out=out)
        return max(0, _status("VmHWM") - before)

    def serve(self) -> str:
        """Run a master here; the result is its address."""
        from pccl.tools.bench.light import Background

        self._background = Background()
        return self._background.run(self._background.serve())

    def used(self) -> float:
        """Seconds of CPU that this process has used, in all its threads."""
        return time.process_time()

    def populate(self, address: str, groups: Mapping[str, int], size: int) -> None:
        """Run light peers here, so many of each group, and wait until all are members of groups of this size."""
        from pccl.tools.bench.light import Background

        self._background = Background()
        self._background.run(self._background.populate(address, groups, size))

    def commit(self, rounds: int) -> None:
        """Have each light peer update and commit so many times."""
        self._background.run(self._background.commit(rounds))


def make_state(size: int) -> State:
    """A state of so many bytes in a few tensors; the same wherever it is made."""
    chance = np.random.default_rng(1)
    count = min(8, size // 4)
    return {f"tensor {i}": chance.random(size // 4 // count, np.float32) for i in range(count)}


def _touched(size: int) -> npt.NDArray[np.float32]:
    """Zeros in memory that is really there."""
    made = np.empty(size // 4, np.float32)
    made.fill(0)
    return made


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def _forget_peak() -> int:
    """Begin a new peak of memory, and return where it begins: what is held now, or, where that is not permitted, the peak so far."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


def main() -> None:
    """Obey until told to finish. An argument is the path of a socket, if stdin and stdout do not lead to who gives the orders."""
    if path := sys.argv[1:]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path[0])
            os.dup2(connection.fileno(), 0)
            os.dup2(connection.fileno(), 1)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    parent = Parent(orders.put)
    desk, order = Orders(parent.tell), ""
    while order != "finish":
        details = json.loads(orders.get())
        order = details.pop("order")
        try:
            result = getattr(desk, order)(**details)
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(exit_code(error) if isinstance(error, pccl.PcclError) else FAILED)  # an MPI would wait for the other ranks
        parent.tell("done", result=result)


if __name__ == "__main__":
    main()
