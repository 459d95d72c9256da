"""Short runs of each benchmark, with processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pccl.tools.bench import command
from pccl.tools.bench.buffers import COLLECTIVES, HALVES, REDUCING, ROOTED
from pccl.tools.bench.calls import TURNS
from pccl.tools.bench.crew import BenchFailed, crew, launched
from pccl.tools.bench.mpi import MPIS, Installed, find
from pccl.tools.bench.plot import plot
from pccl.tools.bench.teams import FACES, OTHERS, TeamOf, gloo_team, mpi_team, pccl_team
from pccl.tools.cli import FAILED, USAGE
from tests.tools.test_cli import run

pytestmark = pytest.mark.process

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")

MPI = Path(os.environ.get("PCCL_TEST_MPI", sys.prefix))
"""The environment in which the MPIs are; tests of those that are not there are skipped."""


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


@pytest.mark.timeout(120)
def test_table_against_gloo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    rows = rows_of(tmp_path, "-b", "4", "-e", "1K", "-f", "256", "--peers", "2", "--seconds", "0", "--face", "both", "--vs", "gloo")
    systems = ("pccl", "pccl atomic", "pccl async", "pccl async atomic", "gloo")
    assert [(row["size"], row["count"], row["system"]) for row in rows] == [(s, s // 4, n) for s in (4, 1024) for n in systems]
    for row in rows:
        assert ordered(row)
        assert row["wrong"] == 0
        assert row["median"] <= row["p99"] <= row["worst"]
        assert row["cpu"] > 0
        assert row["busbw"] == row["algbw"] == pytest.approx(row["size"] / row["median"] / 1e3)
        if row["system"] != "gloo":
            assert 0 < row["x gloo"]["p25"] <= row["x gloo"]["median"] <= row["x gloo"]["p75"]
    table = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert table[0].split()[:7] == ["size(B)", "count", "type", "redop", "root", "peers", "system"]
    assert len(table) == 1 + len(rows)
    assert len({len(line) for line in table}) == 1


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The files of fonts that matplotlib has used once stay open: here, and not in a test."""
    pytest.importorskip("matplotlib")
    rows = [{"size": size, "peers": 2, "system": "a", "algbw": size / 1e6, "p10": 1.0, "p90": 2.0} for size in (4, 1 << 20)]
    plot(rows, "title", tmp_path_factory.mktemp("plot") / "a.png")


@pytest.mark.usefixtures("fonts")
def test_an_algorithm_a_picture_and_a_least_bandwidth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, path = tmp_path / "found.png", tmp_path / "found.json"
    options = [
        "-b",
        "4",
        "-e",
        "64K",
        "-f",
        "16384",
        "--peers",
        "3",
        "--seconds",
        "0",
        "--no-atomic",
        "--vs",
        "none",
        "--algorithm",
        "ring",
    ]
    assert run("bench", *options, "--plot", str(picture), "--min-busbw", "1000", "--json", str(path)) == FAILED
    rows = json.loads(path.read_text())["rows"]
    assert [row["system"] for row in rows] == ["pccl ring"] * 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    complaints = [line for line in capsys.readouterr().err.splitlines() if "is below --min-busbw 1000" in line]
    assert len(complaints) == 2
    assert run("bench", *options, "--min-busbw", "1e-9") == 0


SHORT = ("-b", "100", "-e", "100", "-n", "2", "-w", "1", "--peers", "3", "--seconds", "0", "--no-atomic")


@pytest.mark.parametrize("name", ["gather", "sendrecv"])
def test_other_collectives(name: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, name, *SHORT, "--vs", "none", "-d", "bfloat16", "-r", "2")
    assert [(row["size"], row["count"], row["op"], row["system"]) for row in rows] == [
        {"gather": (102, 17, "none", "pccl"), "sendrecv": (100, 50, "none", "pccl")}[name]
    ]
    assert all(ordered(row) and row["wrong"] == 0 and row["samples"] == 2 * TURNS for row in rows)
    assert [row["root"] for row in rows] == [2 if name in ROOTED else -1]


@pytest.mark.parametrize("system", MPIS)
def test_table_against_mpi(system: str, tmp_path: Path) -> None:
    installed(system)
    rows = rows_of(tmp_path, *SHORT, "--vs", system, "--mpi", str(MPI))
    assert [row["system"] for row in rows] == ["pccl", system]
    assert all(ordered(row) and row["wrong"] == 0 for row in rows)
    assert rows[0][f"x {system}"]["median"] > 0


@pytest.mark.parametrize("system", [*FACES, *OTHERS])
async def test_every_system_has_every_collective(system: str) -> None:
    start: TeamOf
    if system in FACES:
        start = functools.partial(pccl_team, face=system)
    elif system in MPIS:
        start = functools.partial(mpi_team, found=installed(system))
    else:
        pytest.importorskip("torch")
        start = gloo_team
    async with start(3) as team:
        for collective, dtype in itertools.product(COLLECTIVES, ("float64", "bfloat16")):
            if not (system in MPIS and dtype in HALVES and collective in REDUCING):
                await team.ask("prepare", collective=collective, size=1000, dtype=dtype, op="max", root=1)
                assert (collective, dtype, await team.ask("check", how={})) == (collective, dtype, [0, 0, 0])


def installed(system: str) -> Installed:
    found = find(system, MPI)
    if not found:
        pytest.skip(f"{system} or mpi4py is not in {MPI}; PCCL_TEST_MPI names an environment that has them")
    return found


@LINUX
@pytest.mark.parametrize("system", MPIS)
async def test_ranks_end_when_the_benchmark_is_cancelled(system: str) -> None:
    found = installed(system)
    processes: list[int] = []

    async def body() -> None:
        async with mpi_team(3, found=found):
            processes.extend(map(os.pidfd_open, descendants()))
            asyncio.get_running_loop().call_soon(task.cancel)
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert_all_end(processes, 1 + 3)  # the launcher, too


@LINUX
async def test_launched_workers_end_when_one_fails() -> None:
    processes: list[int] = []
    launcher = ["bash", "-c", 'for rank in 0 1 2; do "$0" "$@" & done; wait -n']

    async def body() -> None:
        async with launched(launcher, 3) as team:
            assert await team.ask("used") == [pytest.approx(1, abs=60)] * 3
            processes.extend(map(os.pidfd_open, descendants()))
            team.workers[1].tell("dance")
            await asyncio.Event().wait()

    with pytest.raises(BenchFailed, match="no attribute 'dance'"):
        await body()
    assert_all_end(processes, 1 + 3)


def assert_all_end(processes: list[int], count: int) -> None:
    """These are not this process's own, to wait for."""
    assert len(processes) >= count
    for process in processes:
        assert select.select([process], [], [], 10.0)[0]
        os.close(process)


def descendants() -> set[int]:
    """Processes that come from this one, by way of others, too."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {os.getpid()}} - found:
        found |= more
    return found


def test_an_error_of_pccl_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker's, as if it had been the command's own."""
    monkeypatch.setattr(command, "OPS", {"bor": None})  # which pccl does not do with floats
    assert run("bench", *SHORT, "-c", "0", "--vs", "none", "-o", "bor") == USAGE
    assert "InvalidArgument: op" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "sides"), [("atomic", 4), ("busy", 2)])
def test_ways_to_reduce(name: str, sides: int, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, name, "-b", "4K", "-e", "4K", "--peers", "2", "--seconds", "0")
    assert len({row["system"] for row in rows}) == len(rows) == sides
    assert all(ordered(row) and row["wrong"] == 0 for row in rows)


@pytest.mark.parametrize("name", ["kill", "stop"])
def test_losses(name: str, tmp_path: Path) -> None:
    counts = {"kill": ["1", "0"], "stop": ["0", "1"]}[name]
    rows = rows_of(tmp_path, "kill", "--peers", "3", "--size", "16M", "--kills", counts[0], "--stops", counts[1])
    assert [row["what"] for row in rows] == ["survivor raised", "retry", "normal call"]
    assert all(ordered(row) for row in rows)
    assert [row["samples"] for row in rows] == [2, 2, 1]
    assert {row["signal"] for row in rows} == {f"SIG{name.upper()}"}


def test_losses_that_come_when_the_call_is_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The survivors have not noticed anything when the next one is to come in."""
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 1000.0)
    assert run("bench", "kill", "--peers", "3", "--size", "4K", "--kills", "1", "--stops", "0") == FAILED
    assert "only 0 of 4 came before the end of the call" in capsys.readouterr().err


def test_newcomers(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "connect", "--members", "1,2", "--count", "2")
    assert [(row["what"], row["holders"], row["samples"]) for row in rows] == [("connect", 1, 2), ("connect", 2, 2)]
    rows = rows_of(tmp_path, "sync-state", "--size", "1M", "--holders", "2", "--peers", "2", "--count", "2")
    assert [(row["what"], row["holders"], row["samples"]) for row in rows] == [("fetch", 2, 2), ("nothing to move", 2, 2)]
    assert all(ordered(row) for row in rows)


@LINUX
def test_memory(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "memory", "--size", "8M", "--peers", "2")
    assert [row["case"] for row in rows] == ["in place", "out of place", "round"]
    assert all(0 <= row["least"] <= row["extra"] < 4 * 8 for row in rows)
    assert rows[0]["least"] >= 8  # what undoes it


def test_master(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "master", "--peers", "9", "--groups", "2", "--rounds", "3", "--processes", "2")
    assert (row["peers"], row["groups"], row["rounds"]) == (8, 2, 3)
    assert all(row[key] > 0 for key in ("join_cpu", "idle_cpu", "commit_cpu", "join_seconds", "commit_seconds"))


def test_a_worker_that_dies_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "OPS", {"avg": None})  # which workers do not know
    assert run("bench", "--op", "avg", "-e", "4", "--peers", "2", "--vs", "none", "--seconds", "60") == FAILED
    error = capsys.readouterr().err
    assert "ended with exit code 1; the end of its log:" in error
    assert "KeyError: 'avg'" in error


def assert_all_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_workers_end_with_the_body() -> None:
    async with crew(2) as team:
        pids = [worker.pid for worker in team.workers]
        assert sorted(worker.number for worker in team.workers) == [0, 1]
        assert await team.ask("used") == [pytest.approx(1, abs=60), pytest.approx(1, abs=60)]
    assert_all_gone(pids)


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
