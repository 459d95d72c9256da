"""What a benchmark finds: rows that are printed as they come, and written as JSON in the end."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

import pccl


class Column(NamedTuple):
    """A column of a table."""

    key: str
    """In the JSON."""
    title: str
    width: int
    form: str = ""
    """How a number is shown, as in f-strings."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one thing is as another, and how sure that is."""

    median: float
    p25: float
    p75: float

    @classmethod
    def of(cls, found: Sequence[float]) -> Ratio:
        """The median and the quartiles of some ratios."""
        low, middle, high = np.percentile(found, [25, 50, 75]).tolist()
        return cls(middle, low, high)

    def __str__(self) -> str:
        median, p25, p75 = (f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for value in (self.median, self.p25, self.p75))
        return f"{median} {p25}-{p75}"


class Report:
    """The figures of one benchmark.

    Args:
        name: the benchmark's.
        options: what it was asked.
        columns: what the table shows; rows may hold more.
        notes: lines that say what the figures mean.
    """

    def __init__(self, name: str, options: dict[str, Any], columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self._facts = {
            "benchmark": name,
            "version": pccl.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "options": options,
        }
        self._columns = columns
        self._notes = notes

    def begin(self) -> None:
        """Say what is measured."""
        facts = f"pccl {pccl.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
        for line in (f"pccl bench {self._facts['benchmark']}: {facts}", *self._notes):
            typer.echo(f"# {line}")
        typer.echo(" ".join(c.title.rjust(c.width) for c in self._columns))

    def row(self, **values: Any) -> None:
        """Add a row."""
        self.rows.append(values)
        typer.echo(" ".join(self._cell(c, values.get(c.key)).rjust(c.width) for c in self._columns))

    def _cell(self, column: Column, value: Any) -> str:
        return "-" if value is None else format(value, column.form)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({**self._facts, "rows": self.rows}, indent=1, default=_plain) + "\n")


def _plain(value: Ratio | Path) -> Any:
    """What JSON has for it."""
    return asdict(value) if isinstance(value, Ratio) else str(value)


def spread(values: Sequence[float], unit: float) -> dict[str, Any]:
    """Median, p10, p90, p99, worst and number of some times in seconds, in a unit of so many seconds."""
    low, middle, high, highest = (float(v) / unit for v in np.percentile(values, [10, 50, 90, 99]))
    return {"median": middle, "p10": low, "p90": high, "p99": highest, "worst": max(values) / unit, "samples": len(values)}


MEDIAN = (Column("median", "median", 10, ".1f"), Column("p10", "p10", 10, ".1f"), Column("p90", "p90", 10, ".1f"))
WORST = Column("worst", "worst", 10, ".1f")
SAMPLES = Column("samples", "n", 6)
PEERS = Column("peers", "peers", 5)
SIZE = Column("size", "size(B)", 11)
