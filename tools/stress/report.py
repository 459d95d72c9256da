"""The outcome of a run: as JSON, and as a page of text."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from statistics import median
from typing import Any

import pccl
from pccl.tools.stress.history import History, Peer
from pccl.tools.stress.judge import ALLOWED, windows
from pccl.tools.stress.plan import Config, Event

Report = dict[str, Any]
FAULTS = {"kill": "worker killed", "stop": "worker stopped for too long", "master": "master killed"}


def make_report(config: Config, events: list[Event], history: History) -> Report:
    """Everything that a run has shown."""
    return {
        "version": pccl.__version__,
        "config": dataclasses.asdict(config),
        "seconds": round(time.monotonic() - history.began, 1) if history.began else 0.0,
        "passed": not history.violations,
        "violations": [violation._asdict() for violation in history.violations],
        "totals": dict(sorted(history.totals.items())),
        "longest_gap": round(history.longest_gap, 3),
        "lineages": len(history.lineages),
        "phases": {kind: dict(sorted(hits.items())) for kind, hits in history.hits.items()} | {"any": history.phases()},
        "phases_missed": history.missed(),
        "recovery": {kind: distribution(history.recoveries(kind)) for kind in FAULTS},
        "evictions": dict(history.evictions.most_common()),
        "usage": {peer.name: held(peer.samples) for peer in history.peers.values() if peer.samples}
        | {f"master {i}": held(samples) for i, samples in enumerate(history.master_samples) if samples},
        "events": [event._asdict() for event in events],
        "played": [dataclasses.asdict(played) | {"event": str(played.event)} for played in history.played],
        "workers": [worker(peer) for peer in history.peers.values()],
    }


def distribution(seconds: list[float]) -> dict[str, float]:
    """Of a sorted list."""
    if not seconds:
        return {"count": 0}
    figures = {"min": seconds[0], "median": median(seconds), "p95": seconds[math.ceil(0.95 * len(seconds)) - 1], "max": seconds[-1]}
    return {"count": len(seconds)} | {name: round(value, 4) for name, value in figures.items()}


def held(samples: list[dict[str, int]]) -> dict[str, list[float]]:
    """What a process held, early and late; its links to fellow members apart."""
    return {name: list(windows(samples, name)) for name in ALLOWED}


def worker(peer: Peer) -> dict[str, Any]:
    """What became of a worker."""
    return {"name": peer.name, "pid": peer.pid, "state": peer.state, "steps": peer.steps, "evictions": peer.evictions, "stops": peer.stops}


def text(report: Report) -> str:
    """For people."""
    totals: Counter[str] = Counter(report["totals"])
    phases = report["phases"]["any"]
    lines = [
        f"seed {report['config']['seed']}, {report['seconds']:g} s: {totals['steps']} steps of {len(report['workers'])} workers, "
        f"{totals['admissions']} admissions, {totals['evictions']} evictions, {report['lineages']} lineage(s) of the state",
        f"calls: {totals['committed']} committed, {totals['aborted']} aborted, {totals['retried']} further attempts",
        f"checks: {totals['checked']} results against the oracle, {totals['restored']} inputs after an abort, "
        f"{totals['compared']} steps and pairs with what others had",
        f"longest time without a step of anybody: {report['longest_gap']:.2f} s",
        "faults per phase: " + ", ".join(f"{phase} {count}" for phase, count in phases.items() if count),
    ]
    for kind, what in FAULTS.items():
        d = report["recovery"][kind]
        if d["count"]:
            milliseconds = ", ".join(f"{name} {1000 * d[name]:.0f}" for name in ("min", "median", "p95", "max"))
            lines.append(f"{what} -> next step, ms: {milliseconds} (of {d['count']})")
    lines += [f"evicted {count} times: {reason}" for reason, count in report["evictions"].items()]
    lines += [f"VIOLATION at {v['at']:.2f} s, {v['who']}: {v['what']}" for v in report["violations"]]
    if not report["passed"]:
        lines.append(f"FAILED: {len(report['violations'])} violation(s)")
    elif report["phases_missed"]:
        lines.append(f"no violation, but only a run that hits every phase counts: no fault hit {', '.join(report['phases_missed'])}")
    else:
        lines.append("passed")
    return "\n".join(lines)
