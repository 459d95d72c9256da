"""`pccl bench`: a table of calls, or what is named."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pccl.collectives.schedules.registry import algorithms
from pccl.tools.bench.calls import Case, Side, measure
from pccl.tools.bench.churn import equals, losses, newcomers
from pccl.tools.bench.cost import master_cpu, memory
from pccl.tools.bench.crew import BenchFailed
from pccl.tools.bench.plot import plot as draw
from pccl.tools.bench.report import MEDIAN, PEERS, SAMPLES, SIZE, WORST, Column, Report
from pccl.tools.bench.systems import COLLECTIVES, DTYPES, OPS
from pccl.tools.cli import FAILED
from pccl.tools.process import run

DEFAULT = "all-reduce"
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _Group(TyperGroup):
    """Takes options without a name to be those of the default benchmark."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=_Group)


@bench_app.callback()
def _about() -> None:
    """Measure, on this machine, over TCP on loopback; without a name: all-reduce.

    Figures of a busy machine are worth little, those of two runs are hard to compare: compare within one.
    """


def parse_size(text: str) -> int:
    """Bytes: ``4``, ``64K``, ``1MiB``; units are powers of 1024."""
    bare = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (bare[:-1], UNITS[bare[-1]]) if bare[-1:] in UNITS else (bare, 1)
    if not number.isdecimal() or not int(number):
        raise typer.BadParameter(f"a number of bytes above 0 is needed, such as 4, 64K or 1M, not {text!r}")
    return int(number) * unit


def parse_count(text: str) -> int:
    """A number of at least 1."""
    if not text.strip().isdecimal() or not int(text):
        raise typer.BadParameter(f"a number above 0 is needed, not {text!r}")
    return int(text)


def _sizes(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [parse_count(part) for part in text.split(",")]


def _peers(text: str) -> list[int]:
    counts = _counts(text)
    if not all(2 <= count <= 16 for count in counts):
        raise typer.BadParameter(f"2 to 16 peers are needed, not {text!r}")
    return counts


Peers = Annotated[Any, typer.Option(parser=_peers, metavar="N,...", help="Processes that make the calls.")]
Sizes = Annotated[Any, typer.Option(parser=_sizes, metavar="SIZE,...", help="Bytes of the tensor: 4, 64K, 16M.")]
Size = Annotated[Any, typer.Option(parser=parse_size, metavar="SIZE", help="Bytes of the tensors: 64M.")]
Seconds = Annotated[float, typer.Option(min=0, metavar="S", help="How long to measure for a number of peers and a size.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
Op = Annotated[str, typer.Option(help=f"One of {', '.join(OPS)}.")]
Json = Annotated[Path | None, typer.Option("--json", "-J", metavar="FILE", help="Write the figures there, too.")]
Against = Annotated[str | None, typer.Option(help="gloo or none; default: gloo if torch is installed.")]
Atomic = Annotated[bool | None, typer.Option("--atomic/--no-atomic", help="Only with commit, or only without. Default: both.")]

CALL_COLUMNS = (SIZE, Column("dtype", "type", 9), Column("op", "redop", 5), PEERS, Column("system", "system", 22), *MEDIAN)
BANDWIDTH = (Column("algbw", "algbw", 8, ".3f"), Column("busbw", "busbw", 8, ".3f"))
CPU = Column("cpu", "cpu s/GB", 9, ".3g")
CALL_NOTES = (
    "times in us: the median, 10th and 90th percentile; of each call, the time of the peer that needed longest",
    "cpu: seconds of CPU time of all peers together, for a buffer of 1 GB (1e9)",
    "algbw, busbw: GB/s (1e9) as in nccl-tests; the size is that of the larger buffer, of the whole and not of a share",
)
WRONG = Column("wrong", "#wrong", 6)


def _measure(report: Report, work: Coroutine[Any, Any, None], json_file: Path | None) -> None:
    """Run a benchmark to its end, or to its failure."""

    async def measured() -> None:
        report.begin()
        await work

    try:
        run(measured())
    except BenchFailed as error:
        typer.echo(f"pccl bench: {error}", err=True)
        raise typer.Exit(FAILED) from None
    if json_file:
        report.save(json_file)
    if any(row.get("wrong") for row in report.rows):
        typer.echo("pccl bench: results are wrong, see the column #wrong", err=True)
        raise typer.Exit(FAILED)


def _one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    if value not in allowed:
        raise typer.BadParameter(f"one of {', '.join(allowed)} is needed, not {value!r}", param_hint=option)
    return value


def _collective(collective: str) -> None:
    """Define the benchmark of a collective."""
    name = collective.replace("_", "-")
    default_sizes = "4,4K,64K,1M,16M,64M"

    @bench_app.command(name, help=f"Time {name}, by turns with gloo's in the same processes.")
    def command(
        sizes: Sizes = default_sizes,
        peers: Peers = "2,4",
        against: Against = None,
        op: Op = "sum",
        dtype: Dtype = "float32",
        atomic: Atomic = None,
        algorithm: Annotated[str, typer.Option(help="pccl's, for example ring; auto: what it chooses by itself.")] = "auto",
        min_busbw: Annotated[float, typer.Option(min=0, metavar="GB/S", help="End with 1 if a row of pccl's has a lower busbw.")] = 0.0,
        seconds: Seconds = 3.0,
        json_file: Json = None,
        plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bandwidths there (PNG); needs matplotlib.")] = None,
    ) -> None:
        _one_of(op, tuple(OPS), "--op")
        for count in peers:
            _one_of(algorithm, ("auto", *algorithms(collective, count)), f"--algorithm with {count} peers")
        _one_of(dtype, DTYPES, "--dtype")
        torch = importlib.util.find_spec("torch") is not None
        other = _one_of(against or ("gloo" if torch else "none"), ("gloo", "none"), "--against")
        if other == "gloo" and not torch:
            raise typer.BadParameter("gloo comes with torch, which is not installed", param_hint="--against")
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise typer.BadParameter("matplotlib is not installed (pip install 'aiopccl[plot]')", param_hint="--plot")
        by: dict[str, bool | str] = {} if algorithm == "auto" else {"algorithm": algorithm}
        ours = [Side(" ".join(["pccl", *map(str, by.values())]), "pccl", {"atomic": False} | by)] if atomic is not True else []
        ours += [Side(" ".join(["pccl atomic", *map(str, by.values())]), "pccl", {"atomic": True} | by)] if atomic is not False else []
        sides = [*ours, Side("gloo", "gloo", {})] if other == "gloo" else ours
        ratio = [Column("ratio", "x gloo", 7, ".2f")] if other == "gloo" else []
        notes = (*CALL_NOTES, "x gloo: how many times as fast as gloo") if ratio else CALL_NOTES
        asked = {"sizes": sizes, "peers": peers, "against": other, "op": op, "dtype": dtype, "atomic": atomic, "seconds": seconds}
        report = Report(name, {**asked, "algorithm": algorithm}, [*CALL_COLUMNS, *BANDWIDTH, CPU, *ratio, WRONG], notes)
        cases = [Case(collective, size, dtype, op, seconds) for size in sizes]
        _measure(report, measure(report, peers, cases, sides, "gloo" if ratio else None), json_file)
        if plot:
            draw(report.rows, f"{name}, {dtype}, {os.cpu_count()} CPUs, over TCP on loopback", plot)
        low = [row for row in report.rows if row["system"].startswith("pccl") and row["busbw"] < min_busbw]
        for row in low:
            text = f"pccl bench: busbw {row['busbw']:.3f} GB/s of {row['system']} with {row['peers']} peers at {row['size']} bytes"
            typer.echo(f"{text} is below --min-busbw {min_busbw:g}", err=True)
        if low:
            raise typer.Exit(FAILED)


for _name in COLLECTIVES:
    _collective(_name)


@bench_app.command("atomic")
def atomic_command(
    sizes: Sizes = "4K,16M,64M", peers: Peers = "2,4", dtype: Dtype = "float32", seconds: Seconds = 5.0, json_file: Json = None
) -> None:
    """Time all-reduce with and without commit, in place and out of place."""
    _one_of(dtype, DTYPES, "--dtype")
    columns = (*CALL_COLUMNS, *BANDWIDTH, Column("ratio", "x plain", 7, ".2f"), WRONG)
    options = {"sizes": sizes, "peers": peers, "dtype": dtype, "seconds": seconds}
    report = Report("atomic", options, columns, (*CALL_NOTES, "x plain: how many times as fast as in place with atomic=False"))
    cases = [Case("all_reduce", size, dtype, "sum", seconds) for size in sizes]
    sides = [
        Side(f"{'atomic' if atomic else 'plain'} {'out of' if out else 'in'} place", "pccl", {"atomic": atomic, "out": out})
        for out in (False, True)
        for atomic in (False, True)
    ]
    _measure(report, measure(report, peers, cases, sides, sides[0].label), json_file)


@bench_app.command("busy")
def busy_command(sizes: Sizes = "4K,1M,64M", peers: Peers = "2,4", seconds: Seconds = 5.0, json_file: Json = None) -> None:
    """Time all-reduce while its caller holds the interpreter half of the time, and while it does not."""
    columns = (*CALL_COLUMNS, *BANDWIDTH, Column("ratio", "x idle", 7, ".2f"), WRONG)
    options = {"sizes": sizes, "peers": peers, "seconds": seconds}
    report = Report("busy", options, columns, (*CALL_NOTES, "x idle: how many times as fast as under a caller that waits"))
    cases = [Case("all_reduce", size, "float32", "sum", seconds) for size in sizes]
    sides = [Side("idle", "pccl", {"busy": False}), Side("busy", "pccl", {"busy": True})]
    _measure(report, measure(report, peers, cases, sides, "idle"), json_file)


@bench_app.command("kill")
def kill_command(
    peers: Annotated[int, typer.Option(min=3, max=16, help="Processes; one of them gets the signal.")] = 4,
    size: Size = "64M",
    kills: Annotated[int, typer.Option(min=0, help="How often one gets SIGKILL.")] = 20,
    stops: Annotated[int, typer.Option(min=0, help="How often one gets SIGSTOP.")] = 3,
    seed: Annotated[int, typer.Option(help="Decides who, and how far into the call.")] = 1,
    json_file: Json = None,
) -> None:
    """Time from a peer's SIGKILL (and SIGSTOP) during an all-reduce to the error of each survivor, and the call after that."""
    notes = (
        "times in ms: from the signal to the error, of each survivor; and of the same call made again at once",
        "x normal: how many times as long as a normal call",
    )
    columns = (Column("signal", "signal", 8), Column("what", "what", 16), *MEDIAN, WORST, SAMPLES, Column("ratio", "x normal", 8, ".2f"))
    report = Report("kill", {"peers": peers, "size": size, "kills": kills, "stops": stops, "seed": seed}, columns, notes)
    strikes = {number: times for number, times in ((signal.SIGKILL, kills), (signal.SIGSTOP, stops)) if times}
    _measure(report, losses(report, peers, size, strikes, seed), json_file)


HOLDERS = Column("holders", "members", 8)
WHAT = Column("what", "what", 16)


@bench_app.command("connect")
def connect_command(
    members: Annotated[Any, typer.Option(parser=_counts, metavar="N,...", help="Members that only update.")] = "2",
    count: Annotated[int, typer.Option(min=1, help="How often to join.")] = 50,
    json_file: Json = None,
) -> None:
    """Time from connect to admitted, into a group whose members do nothing but update, once a millisecond."""
    report = Report("connect", {"members": members, "count": count}, (WHAT, HOLDERS, *MEDIAN, WORST, SAMPLES), ("times in ms",))
    _measure(report, newcomers(report, members, count, 0), json_file)


@bench_app.command("sync-state")
def sync_state_command(
    size: Size = "256M",
    holders: Annotated[Any, typer.Option(parser=_counts, metavar="N,...", help="Members that have the state when one comes.")] = "1,3",
    peers: Annotated[Any, typer.Option(parser=_peers, metavar="N,...", help="Members that all have the state.")] = "2,4",
    count: Annotated[int, typer.Option(min=1, help="How often.")] = 5,
    json_file: Json = None,
) -> None:
    """Time a newcomer's sync_state, and one with nothing to move."""
    options = {"size": size, "holders": holders, "peers": peers, "count": count}
    report = Report("sync-state", options, (WHAT, HOLDERS, SIZE, *MEDIAN, WORST, SAMPLES), ("times in ms",))

    async def both() -> None:
        await newcomers(report, holders, count, size)
        await equals(report, peers, count, size)

    _measure(report, both(), json_file)


@bench_app.command("memory")
def memory_command(size: Size = "256M", peers: Peers = "2,4", json_file: Json = None) -> None:
    """Find the most memory that a peer holds beyond its tensors, while it reduces in place, out of place, and in a round. Linux only."""
    columns = (Column("case", "case", 14), PEERS, SIZE, Column("extra", "most(MiB)", 10, ".1f"), Column("least", "least(MiB)", 10, ".1f"))
    notes = ("most, least: of the peers, the peak during three calls minus what was there before, tensors included",)
    report = Report("memory", {"size": size, "peers": peers}, columns, notes)
    _measure(report, memory(report, peers, size), json_file)


@bench_app.command("master")
def master_command(
    peers: Annotated[Any, typer.Option(parser=_counts, metavar="N,...", help="Light peers: they have no links.")] = "100,1000",
    groups: Annotated[int, typer.Option(min=1, help="Groups that they form.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often each updates and commits.")] = 100,
    processes: Annotated[int, typer.Option(min=1, help="Processes that the peers share.")] = 4,
    json_file: Json = None,
) -> None:
    """Find the CPU time that a master needs for each peer and commit."""
    if min(peers) < groups:
        raise typer.BadParameter(f"{groups} groups need as many peers at least, not {min(peers)}", param_hint="--peers")
    columns = (
        Column("peers", "peers", 6),
        Column("groups", "groups", 6),
        Column("join_cpu", "join(us)", 10, ".1f"),
        Column("idle_cpu", "idle(us/s)", 10, ".1f"),
        Column("commit_cpu", "commit(us)", 10, ".1f"),
        Column("join_seconds", "join(s)", 8, ".2f"),
        Column("commit_seconds", "commits(s)", 10, ".2f"),
    )
    notes = (
        "us: CPU of the master's process for each peer: for its joining, for a second of its heartbeats, and for a commit",
        "s: how long it took until all had joined, and until all had committed; in that time heartbeats went on",
    )
    report = Report("master", {"peers": peers, "groups": groups, "rounds": rounds, "processes": processes}, columns, notes)
    _measure(report, master_cpu(report, peers, groups, rounds, processes), json_file)
