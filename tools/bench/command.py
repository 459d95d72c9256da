"""`pccl bench`: a table of calls, or what is named."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pccl.collectives.schedules.registry import algorithms
from pccl.tools.bench.buffers import COLLECTIVES, DTYPES, OPS, STEPS
from pccl.tools.bench.calls import Case, Pace, Side, measure
from pccl.tools.bench.churn import equals, losses, newcomers
from pccl.tools.bench.cost import master_cpu, memory
from pccl.tools.bench.crew import BenchFailed
from pccl.tools.bench.options import (
    Algorithm,
    Atomic,
    Check,
    Dtype,
    Face,
    Iters,
    Json,
    MaxBytes,
    MinBusbw,
    MinBytes,
    Op,
    Peers,
    Plot,
    Prefix,
    Quantize,
    Root,
    Seconds,
    Size,
    StepBytes,
    StepFactor,
    Transport,
    Vs,
    Warmup,
    one_of,
    parse_counts,
    parse_peers,
    sizes,
)
from pccl.tools.bench.plot import plot as draw
from pccl.tools.bench.report import MEDIAN, PEERS, SAMPLES, SIZE, WORST, Column, Report
from pccl.tools.bench.teams import FACES, TeamOf, other, pccl_team
from pccl.tools.cli import FAILED
from pccl.tools.process import run

DEFAULT = "all-reduce"
HERE = Path(sys.prefix)


class _Group(TyperGroup):
    """Takes options without a name to be those of the default benchmark."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=_Group)


@bench_app.callback()
def _about() -> None:
    """Measure, on this machine; without a name: all-reduce.

    Figures of a busy machine are worth little, those of two runs are hard to compare: compare within one.
    """


CALL_COLUMNS = (
    SIZE,
    Column("count", "count", 10),
    Column("dtype", "type", 8),
    Column("op", "redop", 5),
    Column("root", "root", 4),
    PEERS,
    Column("system", "system", 20),
    Column("median", "time(us)", 10, ".1f"),
    Column("p99", "p99(us)", 10, ".1f"),
    Column("algbw", "algbw", 7, ".3f"),
    Column("busbw", "busbw", 7, ".3f"),
    Column("wrong", "#wrong", 6),
    Column("cpu", "cpu s/GB", 9, ".3g"),
)
CALL_NOTES = (
    "time: the median (p50); of each call, the time of the peer that needed longest",
    "size: bytes of the larger buffer, of the whole and not of a share; algbw, busbw: GB/s (1e9), as in nccl-tests",
    "cpu: seconds of CPU time of all peers together, for a buffer of 1 GB",
)
RATIO_NOTE = "how many times as fast: the median over the turns, and their quartiles"


def _ratio(label: str, title: str) -> Column:
    return Column(f"x {label}", title, 20)


def _measure(report: Report, work: Coroutine[Any, Any, None], json_file: Path | None) -> None:
    """Run a benchmark to its end, or to its failure."""

    async def measured() -> None:
        report.begin()
        await work

    try:
        run(measured())
    except BenchFailed as error:
        typer.echo(f"pccl bench: {error}", err=True)
        raise typer.Exit(error.code) from None
    if json_file:
        report.save(json_file)
    if any(row.get("wrong") for row in report.rows):
        typer.echo("pccl bench: results are wrong, see the column #wrong", err=True)
        raise typer.Exit(FAILED)


def _collective(collective: str) -> None:
    """Define the benchmark of a collective."""
    name = collective.replace("_", "-")

    @bench_app.command(name, help=f"Time {name}, by turns with that of other libraries, each in processes of its own.")
    def command(
        ctx: typer.Context,
        minbytes: MinBytes = "4",
        maxbytes: MaxBytes = "64M",
        stepfactor: StepFactor = 4,
        stepbytes: StepBytes = None,
        peers: Peers = "2,4",
        op: Op = "sum",
        datatype: Dtype = "float32",
        root: Root = 0,
        seconds: Seconds = 2.0,
        iters: Iters = None,
        warmup_iters: Warmup = 2,
        check: Check = 1,
        vs: Vs = "gloo,mpich,openmpi",
        mpi: Prefix = HERE,
        face: Face = "sync",
        atomic: Atomic = None,
        transport: Transport = None,
        algorithm: Algorithm = "auto",
        quantize: Quantize = None,
        min_busbw: MinBusbw = 0.0,
        json_file: Json = None,
        plot: Plot = None,
    ) -> None:
        one_of(op, tuple(OPS), "--op")
        one_of(datatype, DTYPES, "--datatype")
        one_of(face, (*FACES, "both"), "--face")
        for count in peers:
            one_of(algorithm, ("auto", *algorithms(collective, count)), f"--algorithm with {count} peers")
        if root >= min(peers):
            raise typer.BadParameter(f"a rank below {min(peers)}, the number of peers, is needed, not {root}", param_hint="--root")
        if transport:
            one_of(transport, ("auto", "tcp"), "--transport")
        if quantize:
            one_of(quantize, tuple(STEPS), "--quantize")
            one_of(collective, ("all_reduce",), "the collective of --quantize")
        if plot and importlib.util.find_spec("matplotlib") is None:
            raise typer.BadParameter("matplotlib is not installed (pip install 'aiopccl[plot]')", param_hint="--plot")
        cases = [Case(collective, size, datatype, op, root) for size in sizes(minbytes, maxbytes, stepfactor, stepbytes)]
        how = {key: value for key, value in (("algorithm", algorithm), ("quantize", quantize)) if value not in (None, "auto")}
        suffix = "".join(f" {value}" for value in how.values())
        faces = list(FACES) if face == "both" else [face]
        settings: dict[str, Any] = {"transport": transport} if transport else {}
        teams: dict[str, TeamOf] = {each: functools.partial(pccl_team, face=each, **settings) for each in faces}
        sides = [
            Side(f"pccl{' async' if each == 'async' else ''}{' atomic' if a else ''}{suffix}", each, {"atomic": a} | how)
            for each in faces
            for a in (False, True)
            if atomic in (None, a)
        ]
        ours = {side.label for side in sides}
        found = {each: other(each, mpi, collective, datatype) for each in vs}
        rivals = {label: start for label, start in found.items() if not isinstance(start, str)}
        sides += [Side(label, label, {}) for label in rivals]
        notes = [*CALL_NOTES, *(f"x {label}: {RATIO_NOTE}" for label in rivals)]
        notes += [reason for reason in found.values() if isinstance(reason, str)]
        report = Report(name, ctx.params, [*CALL_COLUMNS, *(_ratio(label, f"x {label}") for label in rivals)], notes)
        pace = Pace(seconds, iters, warmup_iters, check)
        _measure(report, measure(report, peers, cases, pace, teams | rivals, sides, list(rivals)), json_file)
        if plot:
            draw(report.rows, f"{name}, {datatype}, {os.cpu_count()} CPUs, one machine", plot)
        low = [row for row in report.rows if row["system"] in ours and row["busbw"] < min_busbw]
        for row in low:
            text = f"pccl bench: busbw {row['busbw']:.3f} GB/s of {row['system']} with {row['peers']} peers at {row['size']} bytes"
            typer.echo(f"{text} is below --min-busbw {min_busbw:g}", err=True)
        if low:
            raise typer.Exit(FAILED)


for _name in COLLECTIVES:
    _collective(_name)


@bench_app.command("atomic")
def atomic_command(
    ctx: typer.Context,
    minbytes: MinBytes = "4K",
    maxbytes: MaxBytes = "64M",
    stepfactor: StepFactor = 128,
    peers: Peers = "2,4",
    datatype: Dtype = "float32",
    seconds: Seconds = 5.0,
    json_file: Json = None,
) -> None:
    """Time all-reduce with and without commit, in place and out of place."""
    one_of(datatype, DTYPES, "--datatype")
    sides = [
        Side(f"{'atomic' if atomic else 'plain'} {'out of' if out else 'in'} place", "sync", {"atomic": atomic} | out)
        for out in ({}, {"out": True})
        for atomic in (False, True)
    ]
    cases = [Case("all_reduce", size, datatype) for size in sizes(minbytes, maxbytes, stepfactor, None)]
    _ways("atomic", ctx, "plain", sides, cases, peers, seconds, json_file)


@bench_app.command("busy")
def busy_command(
    ctx: typer.Context,
    minbytes: MinBytes = "4K",
    maxbytes: MaxBytes = "64M",
    stepfactor: StepFactor = 128,
    peers: Peers = "2,4",
    seconds: Seconds = 5.0,
    json_file: Json = None,
) -> None:
    """Time all-reduce while its caller holds the interpreter half of the time, and while it does not."""
    sides = [Side(name, "sync", {"atomic": False, "busy": name == "busy"}) for name in ("idle", "busy")]
    cases = [Case("all_reduce", size) for size in sizes(minbytes, maxbytes, stepfactor, None)]
    _ways("busy", ctx, "idle", sides, cases, peers, seconds, json_file)


def _ways(
    name: str,
    ctx: typer.Context,
    against: str,
    sides: Sequence[Side],
    cases: Sequence[Case],
    peers: Sequence[int],
    seconds: float,
    json_file: Path | None,
) -> None:
    """Compare ways to reduce with the first of them."""
    title, first = f"x {against}", sides[0].label
    report = Report(name, ctx.params, [*CALL_COLUMNS, _ratio(first, title)], [*CALL_NOTES, f"{title}: {RATIO_NOTE} ({first})"])
    _measure(report, measure(report, peers, cases, Pace(seconds), {"sync": pccl_team}, sides, [first]), json_file)


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
    members: Annotated[Any, typer.Option(parser=parse_counts, metavar="N,...", help="Members that only update.")] = "2",
    count: Annotated[int, typer.Option(min=1, help="How often to join.")] = 50,
    json_file: Json = None,
) -> None:
    """Time from connect to admitted, into a group whose members do nothing but update, once a millisecond."""
    report = Report("connect", {"members": members, "count": count}, (WHAT, HOLDERS, *MEDIAN, WORST, SAMPLES), ("times in ms",))
    _measure(report, newcomers(report, members, count, 0), json_file)


@bench_app.command("sync-state")
def sync_state_command(
    size: Size = "256M",
    holders: Annotated[Any, typer.Option(parser=parse_counts, metavar="N,...", help="Members that have the state when one comes.")] = "1,3",
    peers: Annotated[Any, typer.Option(parser=parse_peers, metavar="N,...", help="Members that all have the state.")] = "2,4",
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
    peers: Annotated[Any, typer.Option(parser=parse_counts, metavar="N,...", help="Light peers: they have no links.")] = "100,1000",
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
