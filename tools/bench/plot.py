"""A picture of a table of calls: bandwidth over size, both logarithmic, a panel for each number of peers, a line for each system."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

INK = "#333333"
COLORS = ("#1565c0", "#c62828", "#2e7d32", "#ef6c00", "#6a1b9a", "#00838f", "#ad1457", "#5d4037")


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        rows: of a report that has sizes, peers, systems and bandwidths.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    groups, systems = list(dict.fromkeys(row["peers"] for row in rows)), list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(3 + 6 * len(groups), 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, peers in zip(panels, groups, strict=True):
        for color, system in zip(cycle(COLORS), systems, strict=False):
            mine = [row for row in rows if (row["peers"], row["system"]) == (peers, system)]
            sizes, speeds = [row["size"] for row in mine], [row["algbw"] for row in mine]
            axes.plot(sizes, speeds, marker="o", markersize=4, color=color, label=system)
            slowest = [row["size"] / row["p90"] / 1e3 for row in mine]
            fastest = [row["size"] / row["p10"] / 1e3 for row in mine]
            axes.fill_between(sizes, slowest, fastest, color=color, alpha=0.1, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({row["size"] for row in rows if row["peers"] == peers}))
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(int(size))))
        axes.set_xlabel("size of the buffer (bytes)")
        axes.set_title(f"{peers} peers", color=INK, fontsize=11)
        axes.grid(color="#e0e0e0", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("algbw: size / time (GB/s); shaded: 10th to 90th percentile")
    panels[-1].legend(frameon=False, loc="lower right")
    figure.suptitle(title, color=INK, fontsize=12)
    figure.savefig(path)


def size_text(size: int) -> str:
    """``64K``, ``1M``, as on the command line."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)
