"""The stress: its parts without processes, and the whole with them."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pccl.tools.cli import FAILED, USAGE
from pccl.tools.stress.history import History
from pccl.tools.stress.judge import FEWEST_SAMPLES, Judge, growth
from pccl.tools.stress.page import DONE, ENGINE, FETCHING, WIRING, Page, Phase
from pccl.tools.stress.plan import FEWEST, Config, draw_events
from pccl.tools.stress.program import IN_FLIGHT, KINDS, MOST, Oracle, difference, draw_calls
from pccl.tools.stress.report import make_report, text
from pccl.tools.stress.screen import Screen
from tests.tools.test_cli import run

HELD = {"memory": 100 << 20, "descriptors": 20, "sockets": 5, "threads": 8, "tasks": 3}


# --- what is to happen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_events_follow_from_the_seed_and_keep_the_crowd_in_bounds(seed: int) -> None:
    config = Config(seed=seed, seconds=120.0, kill_master=True)
    events = draw_events(config)
    assert events == draw_events(config)
    assert [event.at for event in events] == sorted(event.at for event in events)
    crowd = set(range(config.peers))
    for event in events:
        if event.kind == "join":
            assert event.target not in crowd
            crowd.add(event.target)
        elif event.kind != "master":
            assert event.target in crowd
            crowd -= {event.target} if event.kind == "kill" else set()
        assert FEWEST <= len(crowd) <= MOST
    assert {event.kind for event in events} == {"kill", "stop", "join", "master"}
    assert {event.aim for event in events} >= {phase.value for phase in Phase if phase.counts}


def test_seeds_differ() -> None:
    assert draw_events(Config(seed=1)) != draw_events(Config(seed=2))


def test_no_rate_no_events() -> None:
    assert not draw_events(Config(kill=0, stop=0, join=0))


def test_every_kind_of_call_comes() -> None:
    calls = [call for step in range(50) for call in draw_calls(1, step)]
    assert len(calls) == 50 * IN_FLIGHT
    assert {call.kind for call in calls} == set(KINDS)


# --- what the calls have to give --------------------------------------------------------------------------------------


def test_oracle_against_plain_sums() -> None:
    oracle = Oracle(1)
    for call in [call for step in range(20) for call in draw_calls(1, step) if call.kind == "round"]:
        for i in range(len(call.sizes)):
            inputs = [oracle.given(uid, 3, call, i).astype(np.float64) for uid in (4, 7, 9)]
            total = {"sum": sum(inputs), "max": np.max(inputs, 0), "min": np.min(inputs, 0), "avg": np.mean(inputs, 0)}[call.op]
            with np.errstate(invalid="ignore"):
                expected = np.asarray(total).astype(np.int64).astype(call.dtype) if call.dtype == "uint8" else total
            assert np.allclose(oracle.reduced((4, 7, 9), 3, call, i), expected, rtol=1e-3), call


def test_inputs_differ_by_member_step_and_call() -> None:
    oracle, (first, second, *_) = Oracle(1), [call._replace(dtype="int32", size=64) for call in draw_calls(1, 0)]
    inputs = [oracle.given(*which) for which in ((0, 0, first), (1, 0, first), (0, 1, first), (0, 0, second))]
    assert len({x.tobytes() for x in inputs}) == 4


def test_differences_are_found() -> None:
    x = np.arange(5.0)
    assert difference("x", x, x.copy()) == ""
    assert "1 of 5 elements, first in 3" in difference("x", x, np.array([0.0, 1, 2, 9, 4]))
    assert "not float64[4]" in difference("x", x, x[:4])
    assert "not float32[5]" in difference("x", x, x.astype(np.float32))


# --- where a worker is ------------------------------------------------------------------------------------------------


def test_phases_are_seen_from_the_other_end(tmp_path: Path) -> None:
    driver = Page(tmp_path / "page", create=True)
    worker = Page(tmp_path / "page")
    assert driver.phases() == {Phase.STARTING}
    worker.enter(Phase.JOINING)
    assert driver.phases() == {Phase.JOINING}
    worker.note(ENGINE, WIRING)
    assert driver.phases() == {Phase.WIRING}
    worker.enter(Phase.UPDATE)
    assert driver.phases() == {Phase.UPDATE, Phase.WIRING}
    worker.enter(Phase.SYNC)
    assert driver.phases() == {Phase.SYNC}
    worker.note(ENGINE, FETCHING)
    assert driver.phases() == {Phase.TRANSFER}
    worker.enter(Phase.COLLECTIVE, rounds=1)
    worker.note(DONE, 300)
    assert driver.phases() == {Phase.COLLECTIVE, Phase.ROUND, Phase.DECISION}
    worker.note(DONE, 0)
    worker.enter(Phase.COLLECTIVE)
    assert driver.phases() == {Phase.COLLECTIVE}
    worker.close()
    driver.close()


# --- what is a violation ----------------------------------------------------------------------------------------------


class Said:
    """A history, and what workers say to its judge."""

    def __init__(self, **config: Any) -> None:
        self.history = History()
        self.judge = Judge(Config(**config), self.history)
        self.history.began = 1.0
        for ordinal in (0, 1):
            self.history.started(ordinal, 100 + ordinal, 1.0)
            self.judge.heard(ordinal, {"event": "joined", "at": 1.0, "uid": ordinal, "epoch": "1.1", "world": 2})

    def step(self, who: int, step: int, **facts: Any) -> None:
        counts = {"committed": 8, "aborted": 0, "retried": 0, "checked": 8, "restored": 0}
        said = {
            "event": "step",
            "at": 2.0 + step,
            "lineage": 1,
            "step": step,
            "epoch": "1.1",
            "uids": [0, 1],
            "hash": "h",
            "outcomes": "C C",
        }
        self.judge.heard(who, said | {"pairs": {}, "counts": counts, "fetched": 0, "usage": HELD} | facts)

    def conclude(self) -> list[str]:
        self.judge.conclude(10.0)
        return [violation.what for violation in self.history.violations]


def test_a_clean_history_has_no_violation() -> None:
    said = Said()
    for step in range(3):
        said.step(0, step, pairs={"4:0>1": True})
        said.step(1, step, pairs={"4:0>1": True})
    assert said.conclude() == []
    assert said.history.totals["compared"] == 4


@pytest.mark.parametrize("wrong", [{"hash": "g"}, {"outcomes": "C A"}, {"pairs": {"4:0>1": False}}])
def test_members_that_differ(wrong: dict[str, Any]) -> None:
    said = Said()
    for step in range(2):
        said.step(0, step, pairs={"4:0>1": True})
        said.step(1, step, **({"pairs": {"4:0>1": True}} | (wrong if step == 0 else {})))
    (violation,) = said.conclude()
    assert violation.startswith("step 0")


def test_a_worker_that_was_put_out_need_not_agree() -> None:
    said = Said()
    for step in range(2):
        said.step(0, step)
    said.step(1, 0, hash="g")
    said.judge.heard(1, {"event": "evicted", "at": 4.0, "error": "lost"})
    said.judge.heard(1, {"event": "joined", "at": 5.0, "uid": 2, "epoch": "1.2", "world": 2})
    said.step(1, 1)
    said.step(0, 2)
    said.step(1, 2)
    assert said.conclude() == []
    assert said.history.evictions == {"lost": 1}


def test_steps_that_are_skipped_or_states_that_move() -> None:
    said = Said()
    for who in (0, 1):
        said.step(who, 0)
        said.step(who, 2 if who else 1, fetched=5 * who)
    said.step(0, 2)
    assert [what[:12] for what in said.conclude()] == ["after step 0", "sync_state m"]


def test_a_newcomer_that_begins_too_early() -> None:
    said = Said()
    for step in range(6):
        said.step(0, step)
        said.step(1, step)
    said.history.started(2, 102, 8.0)
    said.judge.heard(2, {"event": "joined", "at": 8.0, "uid": 2, "epoch": "1.2", "world": 3})
    said.step(2, 4)
    assert "when others had committed 5" in said.conclude()[0]


def test_a_run_that_proves_nothing() -> None:
    assert all("proves nothing" in what for what in Said().conclude())


def test_phases_that_were_not_hit() -> None:
    said = Said(require_phases=True)
    for who in (0, 1):
        said.step(who, 0)
        said.step(who, 1)
    (violation,) = said.conclude()
    assert "no fault hit these phases: joining, wiring" in violation


def test_hangs() -> None:
    said = Said(gap=20.0)
    said.step(0, 0)
    assert not said.judge.hangs(20.9)
    assert "w1 has committed nothing" in said.judge.hangs(21.1)
    said.history.peers[1].stopped = True
    assert not said.judge.hangs(21.1)
    said.history.resumed(said.history.peers[1], 21.1)
    assert not said.judge.hangs(21.2)
    said.history.master_away = True
    assert not said.judge.hangs(99.0)
    said.history.master_back(99.0)
    for peer in said.history.peers.values():
        peer.stopped = True
    assert "nobody has committed" in said.judge.hangs(99.0)


@pytest.mark.parametrize("name", HELD)
def test_growth_is_found(name: str) -> None:
    samples = [dict(HELD) for _ in range(FEWEST_SAMPLES)]
    assert growth(samples) == []
    for i, sample in enumerate(samples):
        sample[name] += i * (4 << 20 if name == "memory" else 1)
    assert [what.split()[0] for what in growth(samples)] == [name]
    assert growth(samples[1:]) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_screen_and_report(terminal: bool) -> None:
    said = Said()
    event = next(event for event in draw_events(Config()) if event.kind == "kill")
    for who in (0, 1):
        said.step(who, 0)
    said.history.hit(event, 2.5, {Phase.DECISION}, recovers=1)
    said.step(0, 1, uids=[0])
    said.judge.heard(0, {"event": "violation", "at": 4.0, "what": "a wrong bit"})
    console = Console(record=True, width=120, force_terminal=terminal, file=io.StringIO())
    with Screen(said.history, console) as screen:
        screen.refresh()
        console.print(screen._page(5.0))
    assert "a wrong bit" in console.export_text()
    report = json.loads(json.dumps(make_report(Config(), [event], said.history)))
    assert report["passed"] is False
    assert report["phases"]["any"]["decision"] == 1
    assert report["recovery"]["kill"] == {"count": 1, "min": 0.5, "median": 0.5, "p95": 0.5, "max": 0.5}
    assert "a wrong bit" in text(report)


# --- the whole --------------------------------------------------------------------------------------------------------


def stress(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a run, whose processes are all gone."""
    code = run(
        "stress", "--peers", "3", "--seconds", "6", *options, "--json", str(folder / "report.json"), "--log-dir", str(folder / "logs")
    )
    report = json.loads((folder / "report.json").read_text())
    for worker in report["workers"]:
        with pytest.raises(ProcessLookupError):
            os.kill(worker["pid"], 0)
    return code, report


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_short_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, report = stress(tmp_path, "--seed", "3", "--kill", "0.5", "--join", "0.8", "--stop", "0.2", "--kill-master")
    assert code == 0, report["violations"]
    assert report["passed"]
    assert report["totals"]["checked"] > 0
    assert report["totals"]["compared"] > 0
    assert [event["kind"] for event in report["events"]] == [event.kind for event in draw_events(Config(**report["config"]))]
    assert {played["event"].split()[0] for played in report["played"]} >= {"kill", "join"}
    assert sum(report["phases"]["any"].values()) > 0


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("plant", "what"), [("result", "is wrong in"), ("state", "has"), ("hang", "has committed nothing"), ("leak", "descriptors grew")]
)
def test_planted_violations_are_found(plant: str, what: str, tmp_path: Path) -> None:
    quiet = ["--kill", "0", "--stop", "0", "--join", "0", "--seconds", "20" if plant == "leak" else "4", "--gap", "6"]
    code, report = stress(tmp_path, *quiet, "--plant", plant)
    assert code == FAILED
    assert any(what in violation["what"] for violation in report["violations"]), report["violations"]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_interrupted_run_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def interrupt(self: Screen) -> None:
        pids[:] = [peer.pid for peer in self._history.peers.values()]
        if self._history.totals["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Screen, "refresh", interrupt)
    assert run("stress", "--log-dir", str(tmp_path)) == 128 + signal.SIGTERM
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_events_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stress", "--events", "--seed", "7") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(draw_events(Config(seed=7)))


@pytest.mark.parametrize("options", [("--peers", "1"), ("--peers", "11"), ("--kill", "-1"), ("--gap", "0"), ("--seconds", "0")])
def test_bad_options(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stress", *options) == USAGE
