"""Plays the list of events with real processes, and leaves none behind."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pccl.tools.stress.child import Child, Message
from pccl.tools.stress.history import History, Peer, Stop
from pccl.tools.stress.judge import Judge
from pccl.tools.stress.page import Page, Phase
from pccl.tools.stress.plan import Config, Event

FORMING = 30.0
"""Seconds within which the first workers have to be one group."""
SETTLED = 3
"""Steps that every worker commits after the last event."""
FINISHING = 20.0
"""Seconds within which every process has to end when it is told to."""
PATIENCE = {Phase.WAITING.value: 5.0, Phase.WIRING.value: 5.0}
"""Seconds that a fault waits for its phase."""
SOON = 0.4
POLL = 0.0005
WATCH = 0.2
CALL_TIMEOUT = 90.0
"""Deadline of the workers' calls: the driver finds a hang before that."""


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
        self.history = history
        self._config = config
        self._events = events
        self._folder = folder
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
                self.history.violate("run", str(hang), time.monotonic())
        finally:
            for page in self._pages.values():
                page.close()
        self._judge.conclude(time.monotonic())

    async def _play(self) -> None:
        watching = self._tasks.create_task(self._watch_all())
        await self._start_master("127.0.0.1:0")
        for ordinal in range(self._config.peers):
            await self._start_worker(ordinal)
        await self._until(lambda: self._together({}, 1), FORMING, "the first workers did not become one group")
        self.history.began = time.monotonic()
        async with asyncio.TaskGroup() as events:
            for event in self._events:
                await asyncio.sleep(self.history.began + event.at - time.monotonic())
                if event.kind == "join":  # who comes next may be its victim
                    await self._start_worker(event.target)
                    self.history.hit(event, time.monotonic(), set())
                else:
                    events.create_task(self._happen(event))
            await asyncio.sleep(self.history.began + self._config.seconds - time.monotonic())
        marks = self._marks()
        self.history.note(time.monotonic(), "no more events")
        await self._until(
            lambda: self._together(marks, SETTLED), self._config.gap, "the workers did not come together after the last event"
        )
        self._over = True
        for child in self._children.values():
            child.finish()
        await self._until(lambda: not any(c.alive for c in self._children.values()), FINISHING, "not every worker ended")
        self._master.finish()
        await self._until(lambda: not self._master.alive, FINISHING, "the master did not end")
        watching.cancel()

    # --- processes --------------------------------------------------------------------------------------------------

    async def _start_master(self, listen: str, *, recover: bool = False) -> None:
        arguments = [listen, "--heartbeat-timeout", str(self._config.heartbeat_timeout), *(["--recover"] if recover else [])]
        self._serving.clear()
        self._master = await Child.start("master_process", arguments, self._folder / "master.log")
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
            self.history.sample(self.history.master_samples, m["usage"], len(self.history.alive))

    async def _start_worker(self, ordinal: int) -> None:
        config = self._config
        path = self._folder / f"page-{ordinal}"
        self._pages[ordinal] = Page(path, create=True)
        options = {
            "seed": config.seed,
            "elements": config.elements,
            "in-flight": config.in_flight,
            "min-world-size": config.min_world_size,
            "heartbeat-timeout": config.heartbeat_timeout,
            "timeout": CALL_TIMEOUT,
            "plant": config.plant if ordinal == 0 or config.plant == "silence" else "",
        }
        arguments = [self._address, str(ordinal), str(path), *(f"--{name}={value}" for name, value in options.items())]
        child = self._children[ordinal] = await Child.start("worker", arguments, self._folder / f"w{ordinal}.log")
        self.history.started(ordinal, child.pid)
        self._tasks.create_task(self._attend(ordinal, child))

    async def _attend(self, ordinal: int, child: Child) -> None:
        code = await child.attend(lambda m: self._judge.heard(ordinal, m))
        peer = self.history.peers[ordinal]
        if child.killed:
            peer.state = "killed"
        elif code or peer.state != "finished":
            peer.state = "ended"
            what = f"its process ended with exit code {code}; the end of its log:\n{child.last_words()}"
            self.history.violate(peer.name, what, time.monotonic())

    # --- events -----------------------------------------------------------------------------------------------------

    async def _happen(self, event: Event) -> None:
        if event.kind == "master":
            await self._replace_master(event)
        else:
            peer, child = self.history.peers[event.target], self._children[event.target]
            await self._aim(event, child)
            if event.kind == "kill":
                await self._kill(event, peer, child)
            elif event.kind == "stop":
                await self._stop(event, peer, child)
            else:
                child.finish()
                self.history.hit(event, time.monotonic(), self._pages[event.target].phases())

    async def _aim(self, event: Event, child: Child) -> None:
        """Wait, for a moment, until the victim is where the fault is to hit it."""
        if event.aim:
            page, aim, deadline = self._pages[event.target], Phase(event.aim), time.monotonic() + PATIENCE.get(event.aim, SOON)
            while child.alive and time.monotonic() < deadline and aim not in page.phases():  # noqa: ASYNC110
                await asyncio.sleep(POLL)

    async def _kill(self, event: Event, peer: Peer, child: Child) -> None:
        member, began = peer.state == "member", time.monotonic()
        await child.kill()
        peer.state, peer.stopped_at = "killed", None
        played = self.history.hit(event, began, self._pages[event.target].phases())
        if member:
            self.history.recovers(played, began, peer.uid)

    async def _stop(self, event: Event, peer: Peer, child: Child) -> None:
        member, began = peer.state == "member", time.monotonic()
        child.signal(signal.SIGSTOP)
        peer.stopped_at = began
        played = self.history.hit(event, began, self._pages[event.target].phases())
        if member and event.seconds > self._config.heartbeat_timeout + 1.0:
            self.history.recovers(played, began, peer.uid)
        await asyncio.sleep(event.seconds)
        if child.alive and peer.alive:
            ended = time.monotonic()
            peer.stops.append(Stop(began, ended))
            peer.stopped_at = None
            self._judge.resumed(peer, began, ended)
            child.signal(signal.SIGCONT)

    async def _replace_master(self, event: Event) -> None:
        if not self._serving.is_set() or self._master.killed:
            return  # the one before is not back yet
        began = time.monotonic()
        deaths = self.history.master_deaths
        deaths.append((began, 0.0))
        await self._master.kill()
        played = self.history.hit(event, began, set())
        self.history.recovers(played, began)
        await asyncio.sleep(event.seconds)
        await self._start_master(self._address, recover=True)
        deaths[-1] = began, time.monotonic()

    # --- watching ---------------------------------------------------------------------------------------------------

    def _marks(self) -> dict[int, int]:
        """How many steps each worker has committed."""
        return {ordinal: peer.steps for ordinal, peer in self.history.peers.items()}

    def _together(self, marks: dict[int, int], steps: int) -> bool:
        """Whether each worker has committed so many steps since the marks, the last of them with all others."""
        peers = self.history.alive
        everyone = {peer.uid for peer in peers}
        return all(p.last and set(p.last["uids"]) == everyone and p.steps - marks.get(p.ordinal, 0) >= steps for p in peers)

    async def _until(self, condition: Callable[[], bool], limit: float, otherwise: str) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if time.monotonic() > deadline:
                await self._explain(f"{otherwise} within {limit:g} s")
            await asyncio.sleep(0.05)

    async def _watch_all(self) -> None:
        """Watch the clock, and have the view drawn."""
        while True:
            await asyncio.sleep(WATCH)
            self._watch()
            hang = self._judge.hangs(time.monotonic()) if self.history.began and not self._over else ""
            if hang:
                await self._explain(hang)

    async def _explain(self, what: str) -> None:
        """Have every process say in its log where it is, and give up."""
        for child in [self._master, *self._children.values()]:
            child.signal(signal.SIGUSR1)
            child.signal(signal.SIGUSR2)
        await asyncio.sleep(1.0)
        raise Hang(f"{what}; the logs say where everyone was")
