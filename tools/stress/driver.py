"""Plays the list of events with real processes, and leaves none behind."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pccl.core.options import Options
from pccl.tools.child import Child, Message
from pccl.tools.stress.history import History, Peer
from pccl.tools.stress.judge import Judge
from pccl.tools.stress.page import NEWCOMERS, Page, Phase
from pccl.tools.stress.plan import Config, Event

FORMING = 60.0
"""Seconds within which the first workers have to be one group, and the last ones have to come together."""
SETTLED = 3
"""Steps that every worker commits after the last event."""
FINISHING = 30.0
"""Seconds within which every process has to end when it is told to."""
PATIENCE, SOON = 5.0, 0.4
"""Seconds that a fault waits for its phase: one of a newcomer, or one that comes in every step."""
POLL = 0.0005
WATCH = 0.2


class Hang(Exception):
    """There is no going on."""


class Driver:
    """One run.

    Args:
        events: what is to happen, in order.
        folder: for logs and pages.
        watch: called a few times a second.
    """

    def __init__(self, config: Config, events: list[Event], folder: Path, history: History, watch: Callable[[], None]) -> None:
        self._config = config
        self._events = events
        self._folder = folder
        self._history = history
        self._judge = Judge(config, history)
        self._watch = watch
        self._children: dict[int, Child] = {}
        self._pages: dict[int, Page] = {}
        self._tasks: asyncio.TaskGroup
        self._master: Child
        self._address = ""
        self._serving = asyncio.Event()
        self._over = False

    async def play(self) -> None:
        """From the first process to the last. No process is left, however this ends."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._play()
        except* Hang as hangs:
            for hang in hangs.exceptions:
                self._history.violate("run", str(hang), time.monotonic())
        finally:
            for page in self._pages.values():
                page.close()
        self._judge.conclude(time.monotonic())

    async def _play(self) -> None:
        history = self._history
        watching = self._tasks.create_task(self._watch_all())
        await self._start_master("127.0.0.1:0")
        for ordinal in range(self._config.peers):
            await self._start_worker(ordinal)
        await self._until(lambda: self._together({}, 1), FORMING, "the first workers did not become one group")
        history.began = time.monotonic()
        async with asyncio.TaskGroup() as events:
            for event in self._events:
                await asyncio.sleep(history.began + event.at - time.monotonic())
                if event.kind == "join":  # who comes next may be its victim
                    await self._start_worker(event.target)
                    history.hit(event, time.monotonic(), set())
                else:
                    events.create_task(self._happen(event))
            await asyncio.sleep(history.began + self._config.seconds - time.monotonic())
        steps = {ordinal: peer.steps for ordinal, peer in history.peers.items()}
        history.note(time.monotonic(), "no more events")
        await self._until(lambda: self._together(steps, SETTLED), FORMING, "the workers did not come together after the last event")
        self._over = True
        for child in self._children.values():
            child.say("finish")
        await self._until(lambda: not any(c.alive for c in self._children.values()), FINISHING, "not every worker ended")
        self._master.say("finish")
        await self._until(lambda: not self._master.alive, FINISHING, "the master did not end")
        watching.cancel()

    # --- processes --------------------------------------------------------------------------------------------------

    async def _start_master(self, *arguments: str) -> None:
        self._serving.clear()
        self._history.master_samples.append([])
        self._master = await Child.start("stress.master_process", *arguments, log=self._folder / "master.log")
        self._tasks.create_task(self._attend_master(self._master))
        await self._serving.wait()

    async def _attend_master(self, child: Child) -> None:
        code = await child.attend(self._heard_master)
        if not child.killed and (code or not self._over):
            raise Hang(f"the master ended with exit code {code}; the end of its log:\n{child.last_words()}")

    def _heard_master(self, m: Message) -> None:
        if m["event"] == "serving":
            self._address = m["address"]
            self._serving.set()
        else:
            self._history.master_samples[-1].append(m["usage"])

    async def _start_worker(self, ordinal: int) -> None:
        path = self._folder / f"page-{ordinal}"
        self._pages[ordinal] = Page(path, create=True)
        plant = self._config.plant if ordinal == 0 else ""
        arguments = [self._address, str(ordinal), str(path), f"--seed={self._config.seed}", f"--plant={plant}"]
        child = self._children[ordinal] = await Child.start("stress.worker", *arguments, log=self._folder / f"w{ordinal}.log")
        self._history.started(ordinal, child.pid, time.monotonic())
        self._tasks.create_task(self._attend(ordinal, child))

    async def _attend(self, ordinal: int, child: Child) -> None:
        code = await child.attend(lambda m: self._judge.heard(ordinal, m))
        peer = self._history.peers[ordinal]
        if child.killed:
            peer.state = "killed"
        elif code or peer.state != "finished":
            peer.state = "ended"
            what = f"its process ended with exit code {code}; the end of its log:\n{child.last_words()}"
            self._history.violate(peer.name, what, time.monotonic())

    # --- events -----------------------------------------------------------------------------------------------------

    async def _happen(self, event: Event) -> None:
        if event.kind == "master":
            await self._replace_master(event)
            return
        peer, child = self._history.peers[event.target], self._children[event.target]
        await self._aim(event, child)
        if event.kind == "kill" and child.alive:
            await self._kill(event, peer, child)
        elif event.kind == "stop" and child.alive and not peer.stopped:
            await self._stop(event, peer, child)

    async def _aim(self, event: Event, child: Child) -> None:
        """Wait, for a moment, until the victim is where the fault is to hit it."""
        if event.aim:
            page, aim = self._pages[event.target], Phase(event.aim)
            deadline = time.monotonic() + (PATIENCE if aim in NEWCOMERS else SOON)
            while child.alive and time.monotonic() < deadline and aim not in page.phases():  # noqa: ASYNC110
                await asyncio.sleep(POLL)

    async def _kill(self, event: Event, peer: Peer, child: Child) -> None:
        began, recovers = time.monotonic(), peer.uid if peer.state == "member" else None
        await child.end()
        peer.state, peer.stopped = "killed", False
        self._history.hit(event, began, self._pages[event.target].phases(), recovers=recovers)

    async def _stop(self, event: Event, peer: Peer, child: Child) -> None:
        began = time.monotonic()
        child.signal(signal.SIGSTOP)
        peer.stopped = True
        peer.stops += 1
        lost = peer.state == "member" and event.seconds > Options().heartbeat_timeout + 1.0
        self._history.hit(event, began, self._pages[event.target].phases(), recovers=peer.uid if lost else None)
        await asyncio.sleep(event.seconds)
        self._history.resumed(peer, time.monotonic())
        child.signal(signal.SIGCONT)

    async def _replace_master(self, event: Event) -> None:
        if self._history.master_away:
            return  # the one before is not back yet
        began, self._history.master_away = time.monotonic(), True
        await self._master.end()
        self._history.hit(event, began, set())
        await asyncio.sleep(event.seconds)
        await self._start_master(self._address, "--recover")
        self._history.master_back(time.monotonic())

    # --- watching ---------------------------------------------------------------------------------------------------

    def _together(self, before: dict[int, int], steps: int) -> bool:
        """Whether each worker has committed so many steps more than before, the last of them with all others."""
        peers = self._history.alive
        everyone = {peer.uid for peer in peers}
        return all(p.last and set(p.last["uids"]) == everyone and p.steps - before.get(p.ordinal, 0) >= steps for p in peers)

    async def _until(self, condition: Callable[[], bool], limit: float, otherwise: str) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                await self._give_up(f"{otherwise} within {limit:g} s")
            await asyncio.sleep(0.05)

    async def _watch_all(self) -> None:
        """Watch the clock, and have the screen drawn."""
        while True:
            await asyncio.sleep(WATCH)
            self._watch()
            hang = self._judge.hangs(time.monotonic()) if self._history.began and not self._over else ""
            if hang:
                await self._give_up(hang)

    async def _give_up(self, what: str) -> None:
        """Have every process that is up say in its log where it is, and end the run."""
        up = [child for ordinal, child in self._children.items() if Phase.STARTING not in self._pages[ordinal].phases()]
        for child in [self._master, *up]:
            child.signal(signal.SIGUSR1)
            child.signal(signal.SIGUSR2)
        await asyncio.sleep(1.0)
        raise Hang(f"{what}; the logs say where everyone was")
