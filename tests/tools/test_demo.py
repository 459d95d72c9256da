"""The demo: its parts without processes, and the whole with them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pccl.tools.cli import FAILED, TIMEOUT
from pccl.tools.demo import command, driver, report, screen
from pccl.tools.demo.data import Digits, load
from pccl.tools.demo.driver import Plan
from pccl.tools.demo.history import History
from pccl.tools.demo.model import Classifier
from pccl.tools.demo.worker_process import WorkerFailed, WorkerProcess
from tests.tools.test_cli import run

DIGEST = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


# --- data and model ---------------------------------------------------------------------------------------------------


def test_images(digits: Digits) -> None:
    assert digits.images.shape == (8000, 784)
    assert digits.held_out_images.shape == (2000, 784)
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    assert set(digits.labels) == set(digits.held_out_labels) == set(range(10))


@pytest.mark.parametrize("world_size", [1, 3, 4, 7])
def test_shards_make_up_the_batch(digits: Digits, world_size: int) -> None:
    whole, labels = digits.shard(40, 250, 0, 1, seed=1)
    shards = [digits.shard(40, 250, rank, world_size, seed=1) for rank in range(world_size)]
    assert sum(len(images) for images, _ in shards) == len(whole) == 250
    for rank, (images, shown) in enumerate(shards):
        assert np.array_equal(images, whole[rank::world_size])
        assert np.array_equal(shown, labels[rank::world_size])


def test_every_epoch_shows_every_image(digits: Digits) -> None:
    seen = np.concatenate([digits.shard(step, 250, 0, 1, seed=1)[1] for step in range(32)])
    assert np.array_equal(np.bincount(seen), np.bincount(digits.labels))


def test_gradients_are_those_of_the_loss(digits: Digits) -> None:
    model, step = Classifier(1), np.float32(1e-2)
    images, labels = digits.images[:20], digits.labels[:20]
    found, _ = model.gradients(images, labels)
    for parameter, gradient in zip(model.parameters, found, strict=True):
        assert gradient.shape == parameter.shape
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        losses = []
        for change in (step, -2 * step):
            parameter[place] += change
            losses.append(model.gradients(images, labels)[1])
        parameter[place] += step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[place], rel=0.05)


def test_gradients_of_shards_add_up(digits: Digits) -> None:
    model = Classifier(1)
    whole, loss = model.gradients(*digits.shard(0, 250, 0, 1, seed=1))
    parts = [model.gradients(*digits.shard(0, 250, rank, 3, seed=1)) for rank in range(3)]
    assert sum(part[1] for part in parts) == pytest.approx(loss, rel=1e-5)
    for i, gradient in enumerate(whole):
        assert np.allclose(sum(part[0][i] for part in parts), gradient, atol=1e-4)


def test_model_learns(digits: Digits) -> None:
    model, again = Classifier(1), Classifier(1)
    assert model.digest() == again.digest() != Classifier(2).digest()
    for step in range(40):
        found, _ = model.gradients(*digits.shard(step, 250, 0, 1, seed=1))
        model.learn([gradient / np.float32(250) for gradient in found], step / 40)
    assert model.accuracy(digits.held_out_images, digits.held_out_labels) > 0.85
    assert model.digest() != again.digest()


# --- what is made of what happened ------------------------------------------------------------------------------------


def said(history: History, name: str, step: int, *, at: float, world: int = 2, attempts: int = 1, fetched: int = 0) -> None:
    message: dict[str, Any] = {"event": "step", "step": step, "at": at, "loss": 1 / (step + 1), "images": 250, "rank": 0, "world": world}
    message |= {"epoch": "1.1", "attempts": attempts, "fetched": fetched, "sources": [], "seconds": 0.01}
    history.heard(name, message)


def played(digest: str = DIGEST) -> History:
    """A run of six steps, two peers of which one is killed, and a newcomer."""
    history = History(6)
    history.began = 10.0
    for name in ("peer-0", "peer-1"):
        history.started(name, 100)
        history.heard(name, {"event": "ready"})
        history.heard(name, {"event": "joined", "rank": 0, "world": 2, "epoch": "1.1"})
    for step in range(2):
        said(history, "peer-0", step, at=11.0 + step)
        said(history, "peer-1", step, at=11.1 + step)
    history.killed("peer-1", 2, at=12.5)
    said(history, "peer-0", 2, at=12.75, world=1, attempts=2)
    history.started("peer-2", 102)
    said(history, "peer-0", 3, at=14.0)
    for step in (4, 5):
        said(history, "peer-2", step, at=11.0 + step, fetched=1_000_000 if step == 4 else 0)
        said(history, "peer-0", step, at=11.1 + step)
    for name in ("peer-0", "peer-2"):
        history.heard(name, {"event": "finished", "digest": DIGEST if name == "peer-0" else digest, "accuracy": 0.97})
    return history


PLAN = Plan(2, 6, 1)


def test_history() -> None:
    history = played()
    assert (history.step, history.lost, history.retried, history.problems()) == (6, 0, 1, [])
    assert history.recovery == 0.25
    assert [(event.kind, event.step) for event in history.events] == [("kill", 2), ("recovered", 3), ("join", 4)]
    assert [step.world for step in history.log] == [2, 2, 1, 2, 2, 2]
    images, steps = history.rates()
    assert (images, steps) == (250.0, 1.0)


def test_history_finds_lost_and_repeated_steps() -> None:
    history = played()
    said(history, "peer-0", 8, at=20.0)
    said(history, "peer-2", 5, at=20.0)
    assert history.lost == 2
    assert history.problems() == ["peer-0 skipped step 6", "peer-0 skipped step 7", "peer-2 committed step 5 twice"]


def test_report_of_a_good_run() -> None:
    found = report.Report(PLAN, played())
    assert found.passed, found.checks
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["recovery_seconds"] == 0.25
    assert [event["at"] for event in facts["events"]] == [2.5, 2.75, 5.0]


def test_report_of_bad_runs() -> None:
    assert failed(played(digest="f" * 32)) == {"parameters"}
    never = played()
    never.peers["peer-2"].committed.clear()
    assert failed(never) == {"newcomer"}
    poor = played()
    poor.peers["peer-2"].accuracy = 0.9
    assert failed(poor) == {"held-out images"}
    short = played()
    short.steps = 7
    assert failed(short) == {"steps"}
    missed = played()
    missed.log[2] = missed.log[2]._replace(attempts=1)
    assert failed(missed) == {"after the kill"}


def failed(history: History) -> set[str]:
    return {check.name for check in report.Report(PLAN, history).checks if not check.passed}


@pytest.mark.parametrize("terminal", [True, False])
def test_screens_and_table(terminal: bool) -> None:
    history = played()
    console = Console(record=True, width=100, force_terminal=terminal, file=io.StringIO())
    with screen.open_screen(console, history) as shown:
        shown.refresh()
        shown.refresh()
    if terminal:
        console.print(screen.draw(history))
    report.Report(PLAN, history).show(console)
    text = console.export_text()
    assert "peer-1 gets SIGKILL inside the all-reduce of step 2" in text
    assert DIGEST in text
    assert "0.250 s until the survivors" in text


def test_screen_before_the_first_step() -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(screen.draw(History(10)))
    assert "starting" in console.export_text()


def test_sparkline() -> None:
    assert screen.sparkline([4, 3, 2, 1], width=4) == "█▇▅▃"
    assert len(screen.sparkline([1.0] * 1000)) <= screen.SPARKS
    assert screen.sparkline([0.0, 0.0]) == "▁▁"


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The files of fonts that matplotlib has used once stay open: here, and not in a test."""
    command._picture(played(), tmp_path_factory.mktemp("fonts") / "a.png")


def test_plot(tmp_path: Path, fonts: None) -> None:
    pytest.importorskip("matplotlib")
    said_where = command._picture(played(), tmp_path / "a.png")
    assert said_where == f"picture: {tmp_path / 'a.png'}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "cannot be written" in command._picture(played(), tmp_path / "no" / "folder.png")


def test_no_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "matplotlib is not installed" in command._picture(played(), tmp_path / "a.png")


@pytest.mark.parametrize("peers", [2, 3, 4, 16])
def test_plan(peers: int) -> None:
    for seed in range(20):
        plan = Plan(peers, 600, seed)
        assert (plan.kill_step, plan.join_step) == (200, 400)
        assert plan.victim != plan.witness
        assert {plan.victim, plan.witness} <= set(range(peers))


@pytest.mark.parametrize(("digest", "accuracy", "code"), [(DIGEST, 0.95, 0), ("f" * 32, 0.95, FAILED), (DIGEST, 0.9499, FAILED)])
def test_exit_code(
    digest: str, accuracy: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = played(digest)
    newcomer = history.peers["peer-3"] = history.peers.pop("peer-2")
    newcomer.accuracy = accuracy

    async def play(self: driver.Driver) -> None:
        vars(self._history).update(vars(history))

    monkeypatch.setattr(driver.Driver, "play", play)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("demo", "--peers", "3", "--plot", str(tmp_path / "a.png")) == code
    shown = capsys.readouterr().out
    assert ("FAILED" in shown) == bool(code)
    assert "(pip install 'aiopccl[plot]')" in shown


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], fonts: None) -> None:
    plot, facts = tmp_path / "demo.png", tmp_path / "demo.json"
    code = run("demo", "--steps", "150", "--peers", "3", "--plot", str(plot), "--json", str(facts), "--timeout", "45")
    shown = capsys.readouterr()
    assert code == 0, shown
    found = json.loads(facts.read_text())
    assert found["passed"]
    assert found["retried_steps"] >= 1
    assert found["lost_steps"] == 0
    assert len({process["digest"] for process in found["processes"] if process["state"] == "finished"}) == 1
    assert [event["kind"] for event in found["events"]] == ["kill", "recovered", "note", "join"]
    assert_all_gone([process["pid"] for process in found["processes"]])


def assert_all_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.process
def test_demo_that_takes_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--plot", str(tmp_path / "demo.png"), "--timeout", "0.2") == TIMEOUT
    assert "not done after 0.2 s" in capsys.readouterr().err


@pytest.mark.process
def test_demo_whose_worker_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(driver, "BATCH", "many")
    assert run("demo", "--plot", str(tmp_path / "demo.png")) == FAILED
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("how", ["stdin ends", "cancelled"])
async def test_worker_ends_with_its_driver(how: str) -> None:
    arguments = ["127.0.0.1:1", "peer-0", "--steps=10", "--batch=250", "--seed=1", "--min-world-size=1", "--strike=3"]
    worker = await WorkerProcess.start("peer-0", arguments, lambda name, message: None)
    attending = asyncio.create_task(worker.attend())
    await worker.hears("ready")
    if how == "cancelled":
        attending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attending
    else:
        assert worker.child._process.stdin
        worker.child._process.stdin.close()
        with pytest.raises(WorkerFailed, match="exit code 1"):
            await attending
    assert_all_gone([worker.child.pid])


@pytest.mark.process
async def test_demo_that_is_interrupted(tmp_path: Path) -> None:
    arguments = ["-m", "pccl.tools", "demo", "--plot", str(tmp_path / "demo.png")]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    await process.stdout.readline()  # it trains
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
