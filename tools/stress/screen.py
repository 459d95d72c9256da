"""A run as it goes: a live table on a terminal, a line now and then elsewhere."""

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
PAUSE = 5.0
"""Seconds between two lines where there is no terminal"""
STYLES = {"member": "green", "connecting": "yellow", "starting": "yellow", "finished": "cyan"}


class Screen:
    """Shows a history; `refresh` is to be called a few times a second."""

    def __init__(self, history: History, console: Console) -> None:
        self._history = history
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._printed = time.monotonic()
        self._before = (time.monotonic(), 0)
        self._rate = 0.0

    def __enter__(self) -> Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        """Show how things are now."""
        now = time.monotonic()
        at, committed = self._before
        if now - at >= 1.0:
            self._rate = (self._history.totals["committed"] - committed) / (now - at)
            self._before = now, self._history.totals["committed"]
        if self._live:
            self._live.update(self._page(now), refresh=True)
        elif now - self._printed >= PAUSE:
            self._printed = now
            self._console.print(self._line(now), highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        history, newest = self._history, self._history.newest
        members = sum(peer.state == "member" for peer in history.alive)
        stopped = sum(peer.stopped for peer in history.alive)
        where = f"epoch {newest['epoch']}, world {len(newest['uids'])}, step {newest['step']}" if newest else "no step yet"
        return (
            f"{now - history.began if history.began else 0.0:6.1f} s  {len(history.alive)} workers, {members} members, {stopped} stopped; "
            f"{where}; {self._rate:.0f} calls/s; {len(history.played)} events; {len(history.violations)} violations"
        )

    def _page(self, now: float) -> Group:
        table = Table(title=self._line(now), title_justify="left", title_style="", box=None, header_style="dim")
        for name in ("worker", "state", "uid", "step", "epoch", "world", "last step", "steps", "evicted"):
            table.add_column(name)
        for peer in self._history.alive:
            table.add_row(*self._row(peer, now))
        log = [Text(line.split("\n")[0], style="red" if "VIOLATION" in line else "") for line in self._history.log[-EVENTS:]]
        return Group(table, Text(""), *log)

    def _row(self, peer: Peer, now: float) -> list[str | Text]:
        state = Text("stopped", style="magenta") if peer.stopped else Text(peer.state, style=STYLES.get(peer.state, ""))
        last = peer.last
        where = [str(last["step"]), last["epoch"], str(len(last["uids"])), f"{now - last['at']:.1f} s ago"] if last else [""] * 4
        return [peer.name, state, str(peer.uid) if peer.uid >= 0 else "", *where, str(peer.steps), str(peer.evictions or "")]
