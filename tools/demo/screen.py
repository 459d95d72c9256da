"""What a run looks like while it goes on: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pccl.tools.demo.history import History, Peer

STYLES = {"starting": "dim", "ready": "dim", "joining": "cyan", "training": "green", "killed": "bold red", "finished": "bold green"}
MARKS = {"kill": ("x", "bold red"), "recovered": ("=", "green"), "join": ("+", "cyan"), "note": (" ", "dim")}
BARS = "▁▂▃▄▅▆▇█"
SPARKS = 48
WIDTH = 72


class Screen(ABC):
    """Shows a history; `refresh` is called a few times per second, and once more in the end."""

    def __enter__(self) -> Screen:
        return self

    @abstractmethod
    def refresh(self) -> None:
        """Show what is new."""

    def __exit__(self, *_: object) -> None:
        self.refresh()


class LiveScreen(Screen):
    """A view that is drawn over and over."""

    def __init__(self, console: Console, history: History) -> None:
        self._history = history
        self._live = Live(draw(history), console=console, auto_refresh=False)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def refresh(self) -> None:
        """Draw."""
        self._live.update(draw(self._history), refresh=True)

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._live.stop()


class PlainScreen(Screen):
    """A line per event, and one after each tenth of the run."""

    def __init__(self, console: Console, history: History) -> None:
        self._console = console
        self._history = history
        self._events = 0
        self._tenths = 0

    def refresh(self) -> None:
        """Print what is new."""
        history = self._history
        for event in history.events[self._events :]:
            self._print(f"{event.at - history.began:6.2f} s  step {event.step:4}  {event.text}")
        self._events = len(history.events)
        if history.log and (tenths := 10 * history.step // history.steps) > self._tenths:
            self._tenths, last = tenths, history.log[-1]
            images, steps = history.rates()
            self._print(
                f"{last.at - history.began:6.2f} s  step {history.step:4}  loss {last.loss:.3f}, {last.world} peers, epoch {last.epoch}, "
                f"{steps:.0f} steps/s, {images:.0f} images/s"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def open_screen(console: Console, history: History) -> Screen:
    """The screen that suits the console."""
    return LiveScreen(console, history) if console.is_terminal else PlainScreen(console, history)


def draw(history: History) -> RenderableType:
    """The whole view."""
    parts: list[RenderableType] = [_headline(history), _bar(history.step / history.steps), _table(history)]
    if len(history.log) > 1:
        parts.append(Text.assemble("loss ", (sparkline([step.loss for step in history.log]), "magenta")))
    for event in history.events:
        mark, style = MARKS[event.kind]
        parts.append(Text(f"{mark} {event.at - history.began:6.2f} s  {event.text}", style=style))
    return Group(*parts)


def _headline(history: History) -> Text:
    if not history.log:
        return Text("starting the peers", style="bold")
    last, (images, steps) = history.log[-1], history.rates()
    return Text.assemble(
        (f"step {history.step} of {history.steps}", "bold"),
        f"   loss {last.loss:.3f}   world size {last.world}   epoch {last.epoch}   {steps:.0f} steps/s   {images:,.0f} images/s",
    )


def _bar(part: float) -> Text:
    full = int(part * WIDTH)
    return Text.assemble(("━" * full, "green"), ("━" * (WIDTH - full), "dim"))


def _table(history: History) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("peer", "pid", "state"):
        table.add_column(column)
    for column in ("rank", "epoch", "world", "step", "loss", "state received"):
        table.add_column(column, justify="right")
    for peer in history.peers.values():
        table.add_row(*_row(peer))
    return table


def _row(peer: Peer) -> list[str | Text]:
    known = peer.step is not None
    return [
        peer.name,
        str(peer.pid),
        Text(peer.state, style=STYLES[peer.state]),
        "" if peer.rank is None or peer.state == "killed" else str(peer.rank),
        peer.epoch,
        str(peer.world) if known else "",
        str(peer.step) if known else "",
        f"{peer.loss:.3f}" if known else "",
        f"{peer.fetched / 1e6:.1f} MB" if peer.fetched else "",
    ]


def sparkline(values: Sequence[float], width: int = SPARKS) -> str:
    """Values as a row of bars, as many to a bar as it takes."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    top = max(means) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int(len(BARS) * mean / top))] for mean in means)
