"""A picture of a run: loss, world size and step time over time, events marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pccl.tools.demo.history import History

COLORS = {"kill": "#c62828", "join": "#1565c0"}
INK = "#333333"
SMOOTH = 15
"""Steps in the running mean of the loss"""


def plot(history: History, path: Path) -> None:
    """Write a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss, world, times = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 2])
    at = [step.at - history.began for step in history.log]

    losses = [step.loss for step in history.log]
    loss.plot(at, losses, color="#b39ddb", linewidth=0.8, label="each step")
    loss.plot(at, _smooth(losses), color="#5e35b1", linewidth=2, label=f"mean of {SMOOTH}")
    loss.set_yscale("log")
    loss.set_ylabel("loss")
    loss.legend(frameon=False, loc="lower left")

    world.step(at, [step.world for step in history.log], where="post", color="#00695c", linewidth=2)
    highest = max(step.world for step in history.log)
    world.set_ylim(0, highest + 1)
    world.locator_params(axis="y", integer=True)
    world.set_ylabel("world size")

    took = [1000 * step.seconds for step in history.log]
    times.scatter(at, took, color="#ef6c00", s=5, linewidths=0)
    again = [i for i, step in enumerate(history.log) if step.attempts > 1]
    times.scatter([at[i] for i in again], [took[i] for i in again], color=COLORS["kill"], s=40, marker="D", linewidths=0, zorder=3)
    for i in again:
        times.annotate("retried", (at[i], took[i]), xytext=(8, 0), textcoords="offset points", va="center", color=COLORS["kill"])
    times.set_ylabel("step time (ms)")
    times.set_ylim(bottom=0)
    times.set_xlabel("seconds since the peers were let go")
    times.set_xlim(0, at[-1])

    for axes in (loss, world, times):
        _clean(axes)
    _mark(history, (loss, world, times))
    _steps_on_top(loss, history, at)
    figure.suptitle(_title(history), color=INK, fontsize=12)
    figure.savefig(path)


def _title(history: History) -> str:
    return f"pccl demo: {len(history.log)} steps committed, {history.lost} lost, {history.retried} retried"


def _smooth(values: list[float]) -> list[float]:
    """A running mean over the last steps."""
    windows = (values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)


def _mark(history: History, panels: tuple[Any, ...]) -> None:
    """A line through all panels for each event, and words in the first."""
    after = "" if history.recovery is None else f"\nothers go on after {1000 * history.recovery:.0f} ms"
    words = {"kill": f"killed{after}", "join": "joined"}
    for event in history.events:
        if event.kind in words:
            color, at = COLORS[event.kind], event.at - history.began
            for axes in panels:
                axes.axvline(at, color=color, linewidth=1.2, linestyle="--")
            text = f"{event.text.split()[0]} {words[event.kind]}"
            place = {"xycoords": ("data", "axes fraction"), "xytext": (6, -4), "textcoords": "offset points", "va": "top"}
            panels[0].annotate(text, (at, 1), color=color, fontweight="bold", **place)


def _steps_on_top(axes: Any, history: History, at: list[float]) -> None:
    """A second scale, in steps."""
    top = axes.secondary_xaxis("top")
    marked = range(0, len(at), max(1, len(at) // 10))
    top.set_xticks([at[i] for i in marked], [str(history.log[i].step) for i in marked])
    top.set_xlabel("step", color=INK)
    top.tick_params(colors=INK)
