"""The benchmarks: their arithmetic without processes, and short runs of each with them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import typer

from pccl.tools.bench import calls, command
from pccl.tools.bench.calls import Case, Side, bus_factor, compare
from pccl.tools.bench.crew import BenchFailed, Crew, crew
from pccl.tools.bench.plot import plot, size_text
from pccl.tools.bench.report import Report, spread
from pccl.tools.bench.systems import COLLECTIVES, DTYPES, OPS, Buffers
from pccl.tools.cli import FAILED, USAGE
from tests.tools.test_cli import run

# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("4", 4), ("4K", 4096), ("64KiB", 65536), ("1mb", 1 << 20), (" 2G ", 2 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert command.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5M", "K", "4X", "4,4"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        command.parse_size(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sizes", "4,many"],
        ["--peers", "1"],
        ["--peers", "2,100"],
        ["--op", "avg"],
        ["--dtype", "complex64"],
        ["--against", "mpi"],
        ["--seconds", "-1"],
        ["no-such-benchmark"],
        ["kill", "--peers", "2"],
        ["connect", "--members", "0"],
        ["master", "--peers", "5", "--groups", "10"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", *arguments) == USAGE


def test_gloo_needs_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("bench", "--against", "gloo") == USAGE
    assert "torch" in capsys.readouterr().err


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert [bus_factor(c, 4) for c in COLLECTIVES] == [1.5, 0.75, 0.75, 1.0, 0.75]


def test_spread() -> None:
    found = spread([0.001 * i for i in range(1, 12)], 0.001)
    assert found == pytest.approx({"median": 6, "p10": 2, "p90": 10, "p99": 10.9, "worst": 11, "samples": 11})


def collect(collective: str, op: str, members: Sequence[Buffers]) -> None:
    """Do to the buffers of all members what the collective does."""
    inputs = [m.x.copy() for m in members]
    reduce = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op].reduce
    for rank, m in enumerate(members):
        shares = [np.split(x, len(members))[rank] for x in inputs] if len(inputs[0]) % len(members) == 0 else []
        if collective == "all_reduce":
            m.x[:] = reduce(inputs)
        elif collective == "reduce_scatter":
            m.y[:] = reduce(shares)
        elif collective == "all_gather":
            m.y[:] = np.concatenate(inputs)
        elif collective == "broadcast":
            m.x[:] = inputs[0]
        else:
            m.y[:] = np.concatenate(shares)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_results_are_told_from_wrong_ones(collective: str, op: str, dtype: str) -> None:
    members = [Buffers(collective, 1000, dtype, op, rank, 3) for rank in range(3)]
    for m in members:
        m.fill()
    collect(collective, op, members)
    assert 1000 <= members[0].nbytes < 1000 + 3 * 8
    for m in members:
        assert m.wrong(out_of_place=False) == 0
        result = m.y if m.has_output else m.x
        result[[0, -1]] += 1
        assert m.wrong(out_of_place=False) == 2
        m.clear()
        assert m.wrong(out_of_place=False) > 0


class Team:
    """A crew without processes, whose calls take as long as is said."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.turns: list[tuple[str, int]] = []
        self._times = times

    async def ask(self, order: str, *, system: str, how: dict[str, bool], count: int) -> list[dict[str, Any]]:
        assert order == "run"
        self.turns.append((system, count))
        return [{"times": [seconds] * count, "cpu": seconds * count / 2} for seconds in self._times[system]]


async def test_sides_take_turns_and_the_slowest_member_counts() -> None:
    team = Team({"a": [0.001, 0.002], "b": [0.005, 0.001]})
    sides = [Side("A", "a", {}), Side("B", "b", {})]
    found = await compare(cast(Crew, team), sides, 0.0)
    count = int(calls.TURN / 0.005)
    assert team.turns == [("a", 2), ("b", 2)] + [("a", count), ("b", count)] * calls.TURNS
    assert {label: side.times for label, side in found.items()} == {
        "A": [0.002] * count * calls.TURNS,
        "B": [0.005] * count * calls.TURNS,
    }
    assert found["A"].cpu == pytest.approx(0.003 / 2 * count * calls.TURNS)


async def test_slow_calls_are_measured_one_at_a_time() -> None:
    team = Team({"a": [30.0]})
    found = await compare(cast(Crew, team), [Side("A", "a", {})], 0.0)
    assert found["A"].times == [30.0] * calls.TURNS


def test_wrong_results_are_reported_and_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def measure(report: Report, peers: list[int], cases: list[Case], sides: list[Side], against: str | None) -> None:
        report.row(size=cases[0].size, system=sides[0].label, wrong=3)

    monkeypatch.setattr(command, "measure", measure)
    assert run("bench", "--json", str(tmp_path / "found.json")) == FAILED
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split() == ["4", "-", "-", "-", "pccl", *["-"] * 7, "3"]
    assert "wrong" in shown.err
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["wrong"] == 3


# --- processes --------------------------------------------------------------------------------------------------------


def rows_of(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark; the rows of its JSON."""
    path = tmp_path / "found.json"
    assert run("bench", *arguments, "--json", str(path)) == 0
    found = json.loads(path.read_text())
    assert found["benchmark"] == next((a for a in arguments if a in command_names()), command.DEFAULT)
    return list(found["rows"])


def command_names() -> set[str]:
    return {c.name for c in command.bench_app.registered_commands if c.name}


def ordered(row: dict[str, Any]) -> bool:
    return bool(0 < row["p10"] <= row["median"] <= row["p90"] <= row["worst"] and row["samples"] > 0)


@pytest.mark.process
@pytest.mark.timeout(120)
def test_table_against_gloo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    rows = rows_of(tmp_path, "--sizes", "4,1K", "--peers", "2", "--seconds", "0")
    assert [(row["size"], row["system"]) for row in rows] == [(s, n) for s in (4, 1024) for n in ("pccl", "pccl atomic", "gloo")]
    for row in rows:
        assert ordered(row)
        assert row["wrong"] == 0
        assert row["median"] <= row["p99"] <= row["worst"]
        assert row["cpu"] > 0
        assert row["busbw"] == row["algbw"] == pytest.approx(row["size"] / row["median"] / 1e3)
    for group in (rows[:3], rows[3:]):
        assert [row["ratio"] for row in group] == pytest.approx([group[2]["median"] / row["median"] for row in group])
    table = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(table) == 1 + len(rows)
    assert len({len(line) for line in table}) == 1


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The files of fonts that matplotlib has used once stay open: here, and not in a test."""
    pytest.importorskip("matplotlib")
    rows = [{"size": size, "peers": 2, "system": "a", "algbw": size / 1e6, "p10": 1.0, "p90": 2.0} for size in (4, 1 << 20)]
    plot(rows, "title", tmp_path_factory.mktemp("plot") / "a.png")


@pytest.mark.process
@pytest.mark.usefixtures("fonts")
def test_an_algorithm_a_picture_and_a_least_bandwidth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, path = tmp_path / "found.png", tmp_path / "found.json"
    options = ["--sizes", "4,64K", "--peers", "3", "--seconds", "0", "--no-atomic", "--against", "none", "--algorithm", "ring"]
    assert run("bench", *options, "--plot", str(picture), "--min-busbw", "1000", "--json", str(path)) == FAILED
    rows = json.loads(path.read_text())["rows"]
    assert [row["system"] for row in rows] == ["pccl ring"] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    complaints = [line for line in capsys.readouterr().err.splitlines() if "is below --min-busbw 1000" in line]
    assert len(complaints) == 2
    assert run("bench", *options, "--min-busbw", "1e-9") == 0


def test_an_algorithm_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "broadcast", "--algorithm", "magic") == USAGE
    shown = capsys.readouterr().err
    assert "auto" in shown
    assert "magic" in shown


@pytest.mark.parametrize(("size", "text"), [(4, "4"), (1 << 10, "1K"), (1536, "1.5K"), (64 << 20, "64M"), (1 << 30, "1G")])
def test_sizes_on_an_axis(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.process
@pytest.mark.parametrize("name", ["reduce-scatter", "all-gather", "broadcast", "all-to-all"])
def test_other_collectives(name: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, name, "--sizes", "100", "--peers", "3", "--seconds", "0", "--no-atomic", "--dtype", "bfloat16")
    assert {row["system"] for row in rows} >= {"pccl"}
    assert all(ordered(row) and row["wrong"] == 0 for row in rows)


@pytest.mark.process
@pytest.mark.parametrize(("name", "sides"), [("atomic", 4), ("busy", 2)])
def test_ways_to_reduce(name: str, sides: int, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, name, "--sizes", "4K", "--peers", "2", "--seconds", "0")
    assert len({row["system"] for row in rows}) == len(rows) == sides
    assert all(ordered(row) and row["wrong"] == 0 for row in rows)


@pytest.mark.process
@pytest.mark.parametrize("name", ["kill", "stop"])
def test_losses(name: str, tmp_path: Path) -> None:
    counts = {"kill": ["1", "0"], "stop": ["0", "1"]}[name]
    rows = rows_of(tmp_path, "kill", "--peers", "3", "--size", "16M", "--kills", counts[0], "--stops", counts[1])
    assert [row["what"] for row in rows] == ["survivor raised", "retry", "normal call"]
    assert all(ordered(row) for row in rows)
    assert [row["samples"] for row in rows] == [2, 2, 1]
    assert {row["signal"] for row in rows} == {f"SIG{name.upper()}"}


@pytest.mark.process
def test_losses_that_come_when_the_call_is_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The survivors have not noticed anything when the next one is to come in."""
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 1000.0)
    assert run("bench", "kill", "--peers", "3", "--size", "4K", "--kills", "1", "--stops", "0") == FAILED
    assert "only 0 of 4 came before the end of the call" in capsys.readouterr().err


@pytest.mark.process
def test_newcomers(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "connect", "--members", "1,2", "--count", "2")
    assert [(row["what"], row["holders"], row["samples"]) for row in rows] == [("connect", 1, 2), ("connect", 2, 2)]
    rows = rows_of(tmp_path, "sync-state", "--size", "1M", "--holders", "2", "--peers", "2", "--count", "2")
    assert [(row["what"], row["holders"], row["samples"]) for row in rows] == [("fetch", 2, 2), ("nothing to move", 2, 2)]
    assert all(ordered(row) for row in rows)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "memory", "--size", "8M", "--peers", "2")
    assert [row["case"] for row in rows] == ["in place", "out of place", "round"]
    assert all(0 <= row["least"] <= row["extra"] < 4 * 8 for row in rows)
    assert rows[0]["least"] >= 8  # what undoes it


@pytest.mark.process
def test_master(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "master", "--peers", "9", "--groups", "2", "--rounds", "3", "--processes", "2")
    assert (row["peers"], row["groups"], row["rounds"]) == (8, 2, 3)
    assert all(row[key] > 0 for key in ("join_cpu", "idle_cpu", "commit_cpu", "join_seconds", "commit_seconds"))


@pytest.mark.process
def test_a_worker_that_dies_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "OPS", {"avg": None})  # which workers do not know
    assert run("bench", "--op", "avg", "--sizes", "4", "--peers", "2", "--against", "none", "--seconds", "60") == FAILED
    error = capsys.readouterr().err
    assert "ended with exit code 1; the end of its log:" in error
    assert "KeyError: 'avg'" in error


def assert_all_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.process
async def test_workers_end_with_the_body() -> None:
    async with crew(2) as team:
        pids = [worker.pid for worker in team.workers]
        assert sorted(worker.number for worker in team.workers) == [0, 1]
        assert await team.ask("used") == [pytest.approx(1, abs=60), pytest.approx(1, abs=60)]
    assert_all_gone(pids)


@pytest.mark.process
@pytest.mark.parametrize("how", ["SIGKILL", "unknown order", "cancelled, one of them stopped"])
async def test_workers_end_when_one_fails(how: str) -> None:
    pids: list[int] = []

    async def body() -> None:
        async with crew(3) as team:
            pids.extend(worker.pid for worker in team.workers)
            victim = team.workers[1]
            if how == "SIGKILL":
                os.kill(victim.pid, signal.SIGKILL)
            elif how == "unknown order":
                victim.tell("dance")
            else:
                victim.stop()
                asyncio.get_running_loop().call_soon(task.cancel)
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    if how.startswith("cancelled"):
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(BenchFailed, match=r"worker \d ended with exit code"):
            await task
    assert len(pids) == 3
    assert_all_gone(pids)


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_benchmark_that_is_interrupted(number: signal.Signals, code: int) -> None:
    arguments = ["-m", "pccl.tools", "bench", "connect", "--count", "1000000"]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    while (await process.stdout.readline()).startswith(b"#"):
        pass  # until the header of the table
    process.send_signal(number)
    await process.communicate()
    assert process.returncode == code
