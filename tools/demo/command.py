"""`pccl demo`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from pccl.core.errors import InvalidArgument
from pccl.tools.cli import FAILED, TIMEOUT
from pccl.tools.demo.history import History
from pccl.tools.process import run

REFRESH = 0.25
"""Seconds between two looks at the run"""
PICTURE = Path("pccl-demo.png")


def demo_command(
    peers: Annotated[int, typer.Option(min=3, max=16, help="Processes at the start; one is killed, and one joins.")] = 4,
    steps: Annotated[int, typer.Option(min=150, help="Steps to train.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Decides first parameters, the order of the images, and who is killed.")] = 1,
    plot: Annotated[Path, typer.Option(metavar="FILE", help="Where the picture goes; needs matplotlib.")] = PICTURE,
    json_file: Annotated[Path | None, typer.Option("--json", "-J", metavar="FILE", help="Write all figures there.")] = None,
    timeout: Annotated[float, typer.Option(metavar="S", help="Give up after so many seconds.")] = 120.0,
) -> None:
    """Train a model on this machine: one peer is killed in the middle of an all-reduce, another joins later.

    A master and the peers, each of them a process, train a classifier on the 10,000 images of handwritten digits that come with pccl.
    In the end all have to hold the same parameters, to the bit, and to read at least 95 % of 2,000 held-out images right.
    """
    from rich.console import Console

    from pccl.tools.demo.driver import Driver, Plan
    from pccl.tools.demo.report import Report
    from pccl.tools.demo.screen import open_screen
    from pccl.tools.demo.worker_process import WorkerFailed

    if json_file:
        _check_writable(json_file)
    console, history, plan = Console(), History(steps), Plan(peers, steps, seed)
    try:
        with open_screen(console, history) as screen:
            run(_play(Driver(plan, history).play(), screen.refresh, timeout))
    except WorkerFailed as error:
        typer.echo(f"pccl demo: {error}", err=True)
        raise typer.Exit(FAILED) from None
    except TimeoutError:
        typer.echo(f"pccl demo: not done after {timeout:g} s, at step {history.step} of {steps}", err=True)
        raise typer.Exit(TIMEOUT) from None
    report = Report(plan, history)
    report.show(console)
    if json_file:
        json_file.write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    console.print(_picture(history, plot), highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if report.passed else FAILED)


def _check_writable(path: Path) -> None:
    """Better now than after the run."""
    try:
        path.touch()
    except OSError as error:
        raise InvalidArgument(f"--json: {path} cannot be written ({error.strerror})") from None


async def _play(play: Coroutine[Any, Any, None], refresh: Callable[[], None], timeout: float) -> None:
    """Play, and look at the run from time to time."""

    async def look() -> None:
        while True:
            refresh()
            await asyncio.sleep(REFRESH)

    looking = asyncio.create_task(look())
    try:
        async with asyncio.timeout(timeout):
            await play
    finally:
        looking.cancel()


def _picture(history: History, path: Path) -> str:
    """Make the picture, and say where it is."""
    from pccl.tools.demo.plot import plot

    try:
        plot(history, path)
    except ImportError:
        return "no picture: matplotlib is not installed (pip install 'aiopccl[plot]')"
    except OSError as error:
        return f"no picture: {path} cannot be written ({error.strerror})"
    return f"picture: {path}"
