"""A run as it goes: a live table on a terminal, a line per second elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pccl.tools.stress.history import History, Peer

EVENTS = 10
"""Lines of the log that are shown"""
STYLES = {"member": "green", "connecting": "yellow", "starting": "yellow", "finished": "cyan"}


class View:
    """Shows a history; `refresh` is to be called a few times a second."""

    def __init__(self, history: History, seconds: float, console: Console) -> None:
        self._history = history
        self._seconds = seconds
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._printed = time.monotonic()
        self._before = (time.monotonic(), 0)
        self._rate = 0.0

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        """Show how things are now."""
        now = time.monotonic()
        at, steps = self._before
        if now - at >= 1.0:
            self._rate = (self._history.totals["committed"] - steps) / (now - at)
            self._before = now, self._history.totals["committed"]
        if self._live:
            self._live.update(self._page(now), refresh=True)
        elif now - self._printed >= 1.0:
            self._printed = now
            self._console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        history = self._history
        at = now - history.began if history.began else 0.0
        members = sum(peer.state == "member" for peer in history.alive)
        stopped = sum(peer.stopped_at is not None for peer in history.alive)
        newest = max(history.alive, key=lambda p: p.commit_at, default=None)
        where = f"epoch {newest.epoch}, world {newest.world}, step {history.step}" if newest else "no worker"
        return (
            f"{at:6.1f} s  {len(history.alive)} workers, {members} members, {stopped} stopped; {where}; {self._rate:.0f} calls/s; "
            f"{len(history.played)} events; {len(history.violations)} violations"
        )

    def _page(self, now: float) -> Group:
        table = Table(title=self._line(now), title_justify="left", title_style="", box=None, header_style="dim")
        for name in ("worker", "state", "uid", "step", "epoch", "world", "last commit", "steps", "evicted"):
            table.add_column(name, justify="right" if name not in ("worker", "state") else "left")
        for peer in self._history.alive:
            table.add_row(*self._row(peer, now))
        log = [Text(line.split("\n")[0], style="red" if "VIOLATION" in line else "") for line in self._history.log[-EVENTS:]]
        return Group(table, Text(""), *log)

    def _row(self, peer: Peer, now: float) -> list[str | Text]:
        state = Text("stopped", style="magenta") if peer.stopped_at is not None else Text(peer.state, style=STYLES.get(peer.state, ""))
        ago = f"{now - peer.commit_at:.1f} s ago" if peer.commit_at else ""
        numbers = [str(x) if x >= 0 else "" for x in (peer.uid, peer.step)]
        return [peer.name, state, *numbers, peer.epoch, str(peer.world or ""), ago, str(peer.steps), str(peer.evictions or "")]
