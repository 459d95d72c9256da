"""Seeds of the simulator: each is a plan, a network and a schedule of faults, and no promise may be broken. More of them: ``make soak``."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.sim.run import run

SEEDS = 300

pytestmark = pytest.mark.sim


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


FOUND = [1119, 17105, 18506]
"""Seeds beyond those that have found something"""


@pytest.mark.parametrize("seed", [*range(SEEDS), *FOUND])
def test_no_promise_is_broken(seed: int) -> None:
    result = run(seed)
    assert result.book.counts["steps"] > 0 or result.faults


@pytest.mark.parametrize("seed", [7, 104, 568, 174, 192, 439])
def test_a_seed_replays_exactly(seed: int) -> None:
    first, second = run(seed), run(seed)
    assert first.trace == second.trace
    assert (first.steps, first.seconds, first.faults) == (second.steps, second.seconds, second.faults)
    assert first.book.counts == second.book.counts


def test_seeds_differ() -> None:
    assert len({run(seed).trace for seed in range(10)}) == 10
