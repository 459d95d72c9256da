"""Whether a process came to hold more and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

Sample = Mapping[str, int]

FEWEST = 60
"""Samples without which nothing is said."""
WARM = 0.2
"""Share of the samples that come before caches and pools are full."""
ALLOWED = {"memory": 64 << 20, "descriptors": 6, "sockets": 4, "threads": 6, "tasks": 4}
"""By how much the late median may exceed the early one."""


def windows(samples: Sequence[Sample], name: str) -> tuple[float, float]:
    """The medians of the first and of the last third, after warming up."""
    values = [sample[name] for sample in samples[int(len(samples) * WARM) :]]
    third = max(1, len(values) // 3)
    return median(values[:third]), median(values[-third:])


def growth(samples: Sequence[Sample], allowed: Mapping[str, int] = ALLOWED) -> list[str]:
    """What has grown beyond what is allowed."""
    if len(samples) < FEWEST:
        return []
    found = []
    for name, limit in allowed.items():
        early, late = windows(samples, name)
        if late > early + limit:
            found.append(f"{name} grew from {early:,.0f} to {late:,.0f} (medians of {len(samples)} samples; {limit:,} more are allowed)")
    return found
