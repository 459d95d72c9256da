"""A picture of a run: loss, world size and step time over time, events marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pccl.tools.demo.history import History

COLORS = {"kill": "#c0392b", "recovered": "#27ae60", "join": "#2874a6", "note": "#999999"}
LABELS = {"kill": "killed", "recovered": "recovered", "join": "joined"}
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
    world.set_yticks(range(highest + 1))
    world.set_ylabel("world size")

    times.vlines(at, 0, [1000 * step.seconds for step in history.log], color="#ef6c00", linewidth=1)
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
    recovery = "" if history.recovery is None else f", going on {1000 * history.recovery:.0f} ms after the kill"
    return f"{len(history.log)} steps, {history.lost} lost, {history.retried} retried{recovery}"


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
    """Lines through all panels, and words in the first; the kill and the recovery are too close to each other for two words."""
    for event in history.events:
        if event.kind not in LABELS:
            continue
        for axes in panels:
            axes.axvline(event.at - history.began, color=COLORS[event.kind], linewidth=1.2, linestyle="--")
        if event.kind != "recovered":
            panels[0].annotate(
                f"{event.text.split()[0]} {LABELS[event.kind]}",
                (event.at - history.began, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -4),
                textcoords="offset points",
                va="top",
                color=COLORS[event.kind],
                fontweight="bold",
            )


def _steps_on_top(axes: Any, history: History, at: list[float]) -> None:
    """A second scale, in steps."""
    top = axes.secondary_xaxis("top")
    marked = [i for i in range(0, len(at), max(1, len(at) // 10))]
    top.set_xticks([at[i] for i in marked], [str(history.log[i].step) for i in marked])
    top.set_xlabel("step", color=INK)
    top.tick_params(colors=INK)
