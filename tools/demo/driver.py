"""The demo's plot: who is started, killed and let in, and when."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

import pccl
from pccl.tools.child import Message
from pccl.tools.demo.history import History
from pccl.tools.demo.worker_process import WorkerProcess

BATCH = 250


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen; equal plans make equal runs, except for the times."""

    peers: int
    steps: int
    seed: int

    @property
    def kill_step(self) -> int:
        """In this step's all-reduce one peer is killed."""
        return self.steps // 3

    @property
    def join_step(self) -> int:
        """In this step a newcomer is sent."""
        return 2 * self.steps // 3

    @property
    def victim(self) -> int:
        """Index of the peer that is killed."""
        return random.Random(self.seed).randrange(self.peers)

    @property
    def witness(self) -> int:
        """Index of a peer that survives, and makes the others wait for it while the driver acts."""
        return (self.victim + 1) % self.peers


class Driver:
    """Plays a plan with real processes.

    Args:
        history: hears of everything.
    """

    def __init__(self, plan: Plan, history: History) -> None:
        self._plan = plan
        self._history = history

    async def play(self) -> None:
        """Run from the first process to the last. No process is left, however this ends.

        Raises:
            WorkerFailed: a worker ended that should not have.
        """
        try:
            async with pccl.Master() as master, asyncio.TaskGroup() as tasks:
                await self._play(master.address, tasks)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _play(self, address: str, tasks: asyncio.TaskGroup) -> None:
        plan, history = self._plan, self._history
        workers = []
        for i in range(plan.peers):
            pauses = [plan.kill_step, plan.join_step] if i == plan.witness else []
            workers.append(await self._start(f"peer-{i}", address, tasks, pauses))
        victim, witness = workers[plan.victim], workers[plan.witness]
        for worker in workers:
            await worker.hears("ready")
        history.began = time.monotonic()
        for worker in workers:
            worker.go_on()

        # The victim is inside: it has called all_reduce and, in a barrier after that, has heard from all the others, so its call is
        # under way; and the call cannot end, since the witness has not called it.
        await witness.hears("paused")
        await victim.hears("inside")
        history.killed(victim.name, plan.kill_step, time.monotonic())
        victim.child.kill()
        witness.go_on()

        newcomer = await self._start(f"peer-{plan.peers}", address, tasks, [])
        await newcomer.hears("ready")
        await witness.hears("paused")
        history.note(time.monotonic(), "note", f"{newcomer.name} is sent to join")
        newcomer.go_on()
        witness.go_on()

    async def _start(self, name: str, address: str, tasks: asyncio.TaskGroup, pauses: list[int]) -> WorkerProcess:
        plan = self._plan
        options = {"steps": plan.steps, "batch": BATCH, "seed": plan.seed, "min-world-size": plan.peers - 1, "strike": plan.kill_step}
        arguments = [address, name, *(f"--{option}={value}" for option, value in options.items())]
        if pauses:
            arguments += ["--pause", *map(str, pauses)]
        worker = await WorkerProcess.start(name, arguments, self._heard)
        tasks.create_task(worker.attend())
        self._history.started(name, worker.child.pid)
        return worker

    def _heard(self, name: str, message: Message) -> None:
        self._history.heard(name, message)
