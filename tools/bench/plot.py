"""A picture of a table of calls: bandwidth over size, both logarithmic, a line for each system and number of peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK = "#333333"
COLORS = ("#1565c0", "#c62828", "#2e7d32", "#ef6c00", "#6a1b9a", "#00838f")
STYLES = ("-", "--", ":", "-.")


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

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for style, peers in zip(STYLES, dict.fromkeys(row["peers"] for row in rows), strict=False):
        for color, system in zip(COLORS, systems, strict=False):
            mine = [row for row in rows if (row["peers"], row["system"]) == (peers, system)]
            sizes, speeds = [row["size"] for row in mine], [row["algbw"] for row in mine]
            axes.plot(sizes, speeds, style, marker="o", markersize=4, color=color, label=f"{system}, {peers} peers")
            slowest = [row["size"] / row["p90"] / 1e3 for row in mine]
            fastest = [row["size"] / row["p10"] / 1e3 for row in mine]
            axes.fill_between(sizes, slowest, fastest, color=color, alpha=0.08, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["size"] for row in rows}))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(int(size))))
    axes.set_xlabel("size of the buffer (bytes)")
    axes.set_ylabel("algbw: size / time (GB/s); shaded: 10th to 90th percentile")
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, color=INK, fontsize=12)
    figure.savefig(path)


def size_text(size: int) -> str:
    """``64K``, ``1M``, as on the command line."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:g}{unit}"
    return str(size)
