"""A peer of the stress run: ``python -m pccl.tools.stress.worker``, started by the driver.

`Worker._train` is an ordinary training loop, the same text for incumbents and newcomers; the rest reports.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import pccl
from pccl.tools.stress.calls import Made, make_all
from pccl.tools.stress.inside import begin, explain_on_signal, usage
from pccl.tools.stress.page import Page, Phase, watch_engines
from pccl.tools.stress.program import Oracle, draw_calls

State = dict[str, Any]

PLANTED_AFTER, PLANTED_AMONG = 5, 3
"""Steps among so many members that a worker makes before it does what it was planted to do."""
CALL_TIMEOUT = 90.0
"""Deadline of the calls: the driver finds a hang before that."""
CONNECTIONS = 1000
"""More than a worker will ever make."""
WEIGHTS = 1 << 20
TOUCHED = 4096
"""Of the weights, in each step."""


def founded(identity: int) -> State:
    """The state that a group begins with."""
    return {
        "lineage": identity,
        "commits": 0,
        "weights": np.zeros(WEIGHTS, np.int32),
        "moments": np.zeros(WEIGHTS, np.float32),
        "history": np.zeros(64, np.uint64),
    }


def advance(state: State, step: int, fingerprint: str, commits: int) -> None:
    """The update of a step: the same on all members if what the calls gave is the same."""
    digest = xxhash.xxh3_64_intdigest(fingerprint.encode())
    start = digest % (WEIGHTS - TOUCHED)
    for name in ("weights", "moments"):
        state[name][start : start + TOUCHED] += digest % 1000
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

    def __init__(self, address: str, ordinal: int, page: Page, seed: int, plant: str) -> None:
        self._address = address
        self._ordinal = ordinal
        self._page = page
        self._seed = seed
        self._plant = plant
        self._oracle = Oracle(seed)
        self._own = random.Random(f"worker {ordinal}")
        self._connection = 0
        self._finishing = threading.Event()
        self._comm: pccl.Communicator | None = None
        self._steps = 0
        self._leaked: list[int] = []
        watch_engines(page)
        self._tell = begin(self._finishing.set).tell

    async def live(self) -> None:
        """Connect and train, until told to finish."""
        explain_on_signal(lambda: self._comm)
        before = usage(None)
        while not self._finishing.is_set():
            await self._connect_and_train()
        after = usage(None)
        self._tell("finished", sockets_before=before["sockets"], sockets=after["sockets"])

    async def _connect_and_train(self) -> None:
        self._page.enter(Phase.JOINING)
        self._connection += 1
        try:
            comm = await pccl.connect(self._address, name=f"w{self._ordinal}.{self._connection}", timeout=CALL_TIMEOUT)
        except pccl.ConnectError as e:
            self._tell("refused", error=str(e))
            return
        self._page.enter(Phase.IDLE)
        self._comm = comm
        self._tell("joined", uid=comm.view.members[comm.rank].uid, epoch=str(comm.view.epoch), world=comm.world_size)
        try:
            await self._train(comm)
            self._page.enter(Phase.LEAVING)
            await comm.leave()
        except (pccl.Evicted, pccl.StateConflict) as e:
            self._tell("evicted", error=str(e))
        finally:
            await comm.close()

    async def _train(self, comm: pccl.Communicator) -> None:
        """The loop."""
        page = self._page
        state: State = {}
        step, declare = 0, False
        while not self._finishing.is_set():
            page.enter(Phase.UPDATE)
            await comm.update()
            page.enter(Phase.SYNC)
            try:
                info = await comm.sync_state(state, revision=step, declare=declare)
            except pccl.StateConflict as e:
                # Everyone who had the state is gone. If it is this peer that has to go, the next update says so.
                self._tell("conflict", error=str(e))
                declare = not state
                continue
            state, step, declare = info.state, info.revision, False
            if not state:
                await self._found(comm, state)
                continue
            calls = draw_calls(self._seed, step)
            page.enter(Phase.COLLECTIVE, rounds=sum(call.kind == "round" for call in calls))
            made = await make_all(comm, calls, self._oracle, step, self._own)
            page.enter(Phase.IDLE)
            await self._misbehave(comm, made, state)
            self._check(made)
            fingerprint = " ".join(each.fingerprint for each in made)
            advance(state, step, fingerprint, fingerprint.count("C"))
            self._report(comm, state, step, made, fingerprint, info.bytes_received)
            step += 1

    async def _found(self, comm: pccl.Communicator, state: State) -> None:
        """Nobody has a state: all begin with the same one, under a name that was never used."""
        identity = np.array([self._ordinal * CONNECTIONS + self._connection])
        everyone = await comm.all_gather(identity, retry=True)
        state.update(founded(int(everyone.out.min())))
        self._tell("founded", lineage=state["lineage"])

    # --- checks and reports -----------------------------------------------------------------------------------------

    def _check(self, made: list[Made]) -> None:
        """Every result of the step; raises if the peer was put out of the group meanwhile."""
        for each in made:
            each.check()
            for problem in each.problems:
                self._tell("violation", what=problem)
        for each in made:
            if each.outcome == "E":
                assert each.error
                raise each.error

    def _report(self, comm: pccl.Communicator, state: State, step: int, made: list[Made], fingerprint: str, fetched: int) -> None:
        self._tell(
            "step",
            lineage=state["lineage"],
            step=step,
            epoch=str(comm.view.epoch),
            uids=[m.uid for m in comm.view.members],
            hash=hash_of(state),
            outcomes=fingerprint,
            pairs={f"{each.call.number}:{name}": ok for each in made for name, ok in each.pairs.items()},
            counts={
                "committed": sum(each.outcome == "C" for each in made),
                "aborted": sum(each.outcome == "A" for each in made),
                "retried": sum(each.retried for each in made),
                "checked": sum(each.checked for each in made),
                "restored": sum(each.restored for each in made),
            },
            fetched=fetched,
            usage=usage(comm),
        )

    async def _misbehave(self, comm: pccl.Communicator, made: list[Made], state: State) -> None:
        """Do wrong, if that is what this worker is there for."""
        self._steps += comm.world_size >= PLANTED_AMONG
        if not self._plant or self._steps <= PLANTED_AFTER:
            return
        if self._plant == "leak":
            self._leaked += [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
        elif self._plant == "hang":
            await asyncio.Event().wait()
        elif self._plant == "state":
            state["weights"][0] ^= 1
        else:
            for each in [each for each in made if each.outcome == "C" and each.call.kind == "all_reduce"]:
                each.spoil()


def main() -> None:
    """Live as long as the driver wants."""
    parser = argparse.ArgumentParser(prog="pccl.tools.stress.worker")
    parser.add_argument("address")
    parser.add_argument("ordinal", type=int)
    parser.add_argument("page", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--plant", default="")
    options = parser.parse_args()

    async def live() -> None:
        await Worker(options.address, options.ordinal, Page(options.page), options.seed, options.plant).live()

    asyncio.run(live())


if __name__ == "__main__":
    main()
