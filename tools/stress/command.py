"""`pccl stress`."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from pccl.tools.cli import FAILED
from pccl.tools.process import run
from pccl.tools.stress.plan import FEWEST, Config, draw_events
from pccl.tools.stress.program import MOST


def stress_command(
    peers: Annotated[int, typer.Option(min=FEWEST, max=MOST, help="Workers at the beginning; later there are from 2 to 10.")] = 6,
    seconds: Annotated[float, typer.Option(min=1, metavar="S", help="How long faults happen.")] = 60.0,
    seed: Annotated[int, typer.Option(help="All faults come from it: the same seed, the same list.")] = 1,
    kill: Annotated[float, typer.Option(min=0, metavar="RATE", help="SIGKILLs per second.")] = 0.4,
    stop: Annotated[float, typer.Option(min=0, metavar="RATE", help="SIGSTOPs per second, each for 0.2 to 6 s.")] = 0.1,
    join: Annotated[float, typer.Option(min=0, metavar="RATE", help="New workers per second.")] = 0.6,
    kill_master: Annotated[bool, typer.Option("--kill-master", help="Kill the master, too, now and then, and start it again.")] = False,
    gap: Annotated[float, typer.Option(min=1, metavar="S", help="How long a worker that is not stopped may commit nothing.")] = 20.0,
    require_phases: Annotated[bool, typer.Option("--require-phases", help="Fail unless faults have hit every phase.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", "-J", metavar="FILE", help="Write the report there.")] = None,
    log_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep all logs there; default: only those of a failure.")] = None,
    show_events: Annotated[bool, typer.Option("--events", help="Only print the list of faults.")] = False,
    plant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run peers on this machine under random faults, and check every result.

    Each worker trains with several collectives in flight and compares every result with what it has to be for the members that took part;
    what workers hold is compared step by step. A hang, a wrong bit, or a process that holds more and more is a violation. Evictions are
    counted: a machine that is too busy for heartbeats may cause them.

    Exit code 1: there was a violation, and the report says which.
    """
    config = Config(peers, seconds, seed, kill, stop, join, kill_master, gap, require_phases, plant)
    if show_events:
        typer.echo("\n".join(f"{event.at:7.2f} s  {event}" for event in draw_events(config)))
    elif not stress(config, json_file, log_dir):
        raise typer.Exit(FAILED)


def stress(config: Config, json_file: Path | None, log_dir: Path | None) -> bool:
    """Play the events and report; returns whether all was well. Logs that nobody asked for are kept only if there was a violation."""
    from rich.console import Console

    from pccl.tools.stress.driver import Driver
    from pccl.tools.stress.history import History
    from pccl.tools.stress.report import make_report, text
    from pccl.tools.stress.screen import Screen

    history, events = History(), draw_events(config)
    folder = log_dir or Path(tempfile.mkdtemp(prefix="pccl-stress-"))
    folder.mkdir(parents=True, exist_ok=True)
    keep = log_dir is not None
    try:
        with Screen(history, Console(stderr=True)) as screen:
            run(Driver(config, events, folder, history, screen.refresh).play())
        report = make_report(config, events, history)
        keep = keep or not report["passed"]
        if json_file:
            json_file.write_text(json.dumps(report, indent=1) + "\n")
        if keep:
            (folder / "events.log").write_text("\n".join(history.log) + "\n")
            typer.echo(f"logs: {folder}", err=True)
        typer.echo(text(report))
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return bool(report["passed"])
