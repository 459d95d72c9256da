"""The command `pccl stress`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pccl.tools.cli import FAILED
from pccl.tools.process import run
from pccl.tools.stress.driver import Driver
from pccl.tools.stress.history import History
from pccl.tools.stress.plan import Config, Event, draw_events
from pccl.tools.stress.report import Report, make_report, save, text
from pccl.tools.stress.view import View


def stress_command(
    peers: Annotated[int, typer.Option(help="Workers at the beginning.")] = 6,
    max_peers: Annotated[int, typer.Option(help="Most workers at a time; there are always two.")] = 10,
    seconds: Annotated[float, typer.Option(help="How long faults happen.")] = 60.0,
    seed: Annotated[int, typer.Option(help="All chance comes from it: the same seed has the same faults.")] = 1,
    kill: Annotated[float, typer.Option(help="SIGKILLs per second.")] = 0.4,
    stop: Annotated[float, typer.Option(help="SIGSTOPs per second, each for 0.2 to 6 s.")] = 0.1,
    join: Annotated[float, typer.Option(help="New workers per second.")] = 0.6,
    leave: Annotated[float, typer.Option(help="Workers that leave of their own will, per second.")] = 0.0,
    kill_master: Annotated[bool, typer.Option("--kill-master", help="Kill the master, too, now and then, and start it again.")] = False,
    elements: Annotated[int, typer.Option(help="Elements in the largest tensor.")] = 1 << 19,
    in_flight: Annotated[int, typer.Option(help="Collectives that each worker has in flight.")] = 8,
    min_world_size: Annotated[int, typer.Option(help="With fewer members there are no collectives.")] = 1,
    heartbeat_timeout: Annotated[float, typer.Option(help="Seconds of silence after which a worker is lost.")] = 3.0,
    gap: Annotated[float, typer.Option(help="Seconds without a commit that are a hang, while nobody is stopped.")] = 12.0,
    require_phases: Annotated[bool, typer.Option("--require-phases", help="Fail unless every phase was hit by a fault.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the report.")] = None,
    log_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to keep all logs; default: only after a failure.")] = None,
    show_events: Annotated[bool, typer.Option("--events", help="Only print the list of faults.")] = False,
    plant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run peers on this machine under random faults, and check every result.

    Exit code 1: something is not as it should be; the report says what. The same seed replays the same faults.
    """
    config = Config(
        peers=peers,
        max_peers=max_peers,
        seconds=seconds,
        seed=seed,
        kill=kill,
        stop=stop,
        join=join,
        leave=leave,
        kill_master=kill_master,
        elements=elements,
        in_flight=in_flight,
        min_world_size=min_world_size,
        heartbeat_timeout=heartbeat_timeout,
        gap=gap,
        require_phases=require_phases,
        plant=plant,
    )
    events = draw_events(config)
    if show_events:
        typer.echo("\n".join(map(str, events)))
        return
    report = stress(config, events, log_dir)
    if json:
        save(report, json)
    typer.echo(text(report))
    if not report["passed"]:
        raise typer.Exit(FAILED)


def stress(config: Config, events: list[Event], log_dir: Path | None = None) -> Report:
    """Play the events, and judge. Logs that nobody asked for are kept only if there is something to look for in them."""
    history = History()
    folder = log_dir or Path(tempfile.mkdtemp(prefix="pccl-stress-"))
    folder.mkdir(parents=True, exist_ok=True)
    keep = True
    try:
        with View(history, config.seconds, Console()) as view:
            run(Driver(config, events, folder, history, view.refresh).play())
        report = make_report(config, events, history)
        keep = log_dir is not None or bool(history.violations)
        if keep:
            (folder / "events.log").write_text("\n".join(history.log) + "\n")
            typer.echo(f"logs: {folder}", err=True)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return report
