"""A peer of the stress run: ``python -m pccl.tools.stress.worker``, started by the driver.

`Worker._train` is an ordinary training loop, the same text for incumbents and newcomers; the rest reports. The worker writes one JSON
object per line to stdout, and ends with its driver: when stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import pccl
from pccl.tools.stress.calls import Made, make_all
from pccl.tools.stress.leash import on_leash
from pccl.tools.stress.oracle import Oracle
from pccl.tools.stress.page import Page, Phase, watch_engines
from pccl.tools.stress.program import draw_calls
from pccl.tools.stress.usage import describe, usage

State = dict[str, Any]

PLANTED_AFTER = 5
"""Steps of a worker before it does what it was planted to do."""
CONNECTIONS = 1000
"""More than a worker will ever make."""


def founded(identity: int) -> State:
    """The state that a group begins with."""
    return {
        "lineage": identity,
        "commits": 0,
        "weights": np.zeros(1 << 20, np.int32),
        "moments": np.zeros(1 << 19, np.float32),
        "history": np.zeros(64, np.uint64),
    }


def advance(state: State, step: int, fingerprint: str, commits: int) -> None:
    """The update of a step: the same on all members if what the calls gave is the same."""
    digest = xxhash.xxh3_64_intdigest(fingerprint.encode())
    for name in ("weights", "moments"):
        values = state[name]
        start = digest % (len(values) - 4096)
        values[start : start + 4096] += digest % 1000
    state["history"][step % 64] = digest
    state["commits"] += commits


def hash_of(state: State) -> str:
    """Of all that is in it."""
    hasher = xxhash.xxh3_128()
    for name in sorted(state):
        value = state[name]
        hasher.update(value.data if isinstance(value, np.ndarray) else f"{name}={value}".encode())
    return hasher.hexdigest()


class Worker:
    """One process, which connects again whenever it is put out of the group."""

    def __init__(self, options: argparse.Namespace, page: Page) -> None:
        self._options = options
        self._page = page
        self._oracle = Oracle(options.seed, options.elements)
        self._own = random.Random(f"worker {options.ordinal}")
        self._connection = 0
        self._finishing = threading.Event()
        self._comm: pccl.Communicator | None = None
        self._steps = 0
        self._planted: list[int] = []
        watch_engines(page)
        on_leash(self._finishing.set)

    async def live(self) -> None:
        """Connect and train, until told to finish."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._describe)
        before = usage(None)
        while not self._finishing.is_set():
            await self._connect_and_train()
        after = usage(None)
        self._tell("finished", sockets_before=before["sockets"], sockets=after["sockets"], usage=after)

    async def _connect_and_train(self) -> None:
        options = self._options
        self._page.enter(Phase.WAITING)
        self._connection += 1
        name = f"w{options.ordinal}.{self._connection}"
        timeouts = {"timeout": options.timeout, "heartbeat_timeout": options.heartbeat_timeout}
        try:
            comm = await pccl.connect(options.address, name=name, min_world_size=options.min_world_size, **timeouts)
        except pccl.ConnectError as e:
            self._tell("refused", error=repr(e))
            return
        self._page.enter(Phase.BETWEEN)
        self._comm = comm
        self._tell("joined", uid=comm.view.members[comm.rank].uid, epoch=str(comm.view.epoch), world=comm.world_size)
        try:
            await self._train(comm)
            self._page.enter(Phase.LEAVING)
            await comm.leave()
        except (pccl.Evicted, pccl.StateConflict) as e:
            self._tell("evicted", error=repr(e), reason=getattr(e, "reason", str(e)))
        finally:
            await comm.close()

    async def _train(self, comm: pccl.Communicator) -> None:
        """The loop."""
        options, page = self._options, self._page
        state: State = {}
        step, declare = 0, False
        while not self._finishing.is_set():
            began = time.monotonic()
            page.enter(Phase.UPDATE)
            await comm.update()
            page.enter(Phase.HASHING)
            try:
                info = await comm.sync_state(state, revision=step, declare=declare)
            except pccl.StateConflict as e:
                # Everyone who had the state is gone. If it is this peer that has to go, the next update says so.
                self._tell("conflict", error=repr(e))
                declare = not state
                continue
            state, step, declare = info.state, info.revision, False
            page.enter(Phase.FLIGHT)
            if not state:
                await self._found(comm, state)
                continue
            calls = draw_calls(options.seed, step, options.in_flight, options.elements)
            made = await make_all(comm, calls, self._oracle, step, self._own)
            page.enter(Phase.BETWEEN)
            await self._misbehave(step, made)
            self._check(made)
            fingerprint = " ".join(each.fingerprint for each in made)
            advance(state, step, fingerprint, sum(each.outcome == "C" for each in made))
            self._report(comm, state, step, made, fingerprint, info.bytes_received, time.monotonic() - began)
            step += 1

    async def _found(self, comm: pccl.Communicator, state: State) -> None:
        """Nobody has a state: all begin with the same one, under a name that was never used."""
        identity = np.array([self._options.ordinal * CONNECTIONS + self._connection])
        try:
            everyone = await comm.all_gather(identity, retry=True)
        except pccl.CollectiveAborted as e:
            self._tell("violation", what=f"all_gather with retry=True was given up: {e}")
            return
        state.update(founded(int(everyone.out.min())))
        self._tell("founded", lineage=state["lineage"])

    # --- checks and reports -----------------------------------------------------------------------------------------

    def _check(self, made: list[Made]) -> None:
        """Every result of the step; raises if the peer was put out of the group meanwhile."""
        if self._options.plant != "silence":
            for each in made:
                each.check()
        for each in made:
            for problem in each.problems:
                self._tell("violation", what=problem)
        for each in made:
            if each.outcome == "E":
                assert each.error
                raise each.error

    def _report(
        self, comm: pccl.Communicator, state: State, step: int, made: list[Made], fingerprint: str, fetched: int, seconds: float
    ) -> None:
        self._steps += 1
        digest = hash_of(state)
        if self._options.plant == "hash" and self._steps > PLANTED_AFTER:
            digest = f"{step:032x}"
        self._tell(
            "step",
            lineage=state["lineage"],
            step=step,
            epoch=str(comm.view.epoch),
            uid=comm.view.members[comm.rank].uid,
            uids=[m.uid for m in comm.view.members],
            hash=digest,
            outcomes=fingerprint,
            committed=sum(each.outcome == "C" for each in made),
            aborted=sum(each.outcome == "A" for each in made),
            retried=sum(each.retried for each in made),
            checked=sum(each.checked for each in made),
            restored=sum(each.restored for each in made),
            pairs={f"{each.call.number}:{name}": ok for each in made for name, ok in each.pairs.items()},
            reasons=sorted({getattr(each.error, "reason", "") for each in made if each.outcome == "A"}),
            fetched=fetched,
            seconds=seconds,
            usage=usage(comm),
        )

    def _tell(self, event: str, **facts: Any) -> None:
        sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), "connection": self._connection, **facts}) + "\n")
        sys.stdout.flush()

    async def _misbehave(self, step: int, made: list[Made]) -> None:
        """Do wrong, if that is what this worker is there for."""
        plant = self._options.plant
        if not plant or self._steps < PLANTED_AFTER:
            return
        if plant == "leak":
            self._planted += [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        elif plant == "hang":
            await asyncio.Event().wait()
        elif plant == "result":
            for each in [each for each in made if each.outcome == "C" and each.call.kind == "all_reduce"]:
                each.spoil("result")
        elif plant == "input":
            for each in [each for each in made if each.outcome == "A" and each.call.kind == "all_reduce"]:
                each.spoil("input")

    def _describe(self) -> None:
        """Say in the log where this worker is."""
        print(describe(self._comm), file=sys.stderr, flush=True)


def main() -> None:
    """Live as long as the driver wants."""
    parser = argparse.ArgumentParser(prog="pccl.tools.stress.worker")
    parser.add_argument("address")
    parser.add_argument("ordinal", type=int)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--elements", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--min-world-size", type=int, required=True)
    parser.add_argument("--heartbeat-timeout", type=float, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--plant", default="")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    asyncio.run(Worker(options, Page(options.page)).live())


if __name__ == "__main__":
    main()
