"""Check 34: churn, short: seeds of the simulator in which much happens, and a few seconds with real processes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.run import run, scenario
from tests.tools.test_cli import run as command


def busy_seeds(count: int) -> list[int]:
    """The first seeds with many kinds of faults, kills and joins among them."""
    found: list[int] = []
    seed = 340_000
    while len(found) < count:
        kinds = set(scenario(seed)[2])
        if {"kill", "join"} <= kinds and len(kinds) >= 4:
            found.append(seed)
        seed += 1
    return found


@pytest.mark.sim
def test_check_34_churn_in_virtual_time() -> None:
    """Each run is checked against its promises: same verdicts and bits on all, right results, no call without an end."""
    counts: Counter[str] = Counter()
    struck: Counter[str] = Counter()
    for seed in busy_seeds(40):
        result = run(seed)
        counts.update(result.book.counts)
        struck.update(word for line in result.faults for word in ("kill", "joins", "freeze", "cut", "master", "leave") if word in line)
    assert counts["steps"] > 400
    assert counts["CollectiveAborted"] > 0
    assert all(struck[word] for word in ("kill", "joins", "freeze", "cut", "master", "leave")), struck


@pytest.mark.process
def test_check_34_churn_with_real_processes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = "stress --peers 4 --seconds 8 --seed 34 --kill 0.4 --stop 0.15 --join 0.5 --kill-master"
    assert command(*words.split(), "--json", str(report), "--log-dir", str(tmp_path / "logs")) == 0
    found = json.loads(report.read_text())
    assert found["passed"]
    assert found["violations"] == []
    assert found["totals"]["committed"] > 20
    assert found["totals"]["checked"] > 20
