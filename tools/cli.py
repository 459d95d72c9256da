"""The command `pccl`: a table of commands, each in a module of its own that is imported when it is used."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer

from pccl.core.errors import CollectiveTimeout, ConnectError, InvalidArgument, PcclError

FAILED, USAGE, UNREACHABLE, TIMEOUT, SIGNALLED = 1, 2, 3, 4, 128
"""Exit codes; 0 is success, and a signal adds its number to SIGNALLED."""


class Command(NamedTuple):
    """A command, before it is imported."""

    where: str
    """``module:name`` of a function, or of a `typer.Typer` with commands of its own."""
    help: str
    """The line that `pccl --help` shows."""

    def load(self) -> Any:
        """Import it."""
        module, _, name = self.where.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS = {
    "master": Command("pccl.tools.master:master_command", "Serve a master until a signal ends it."),
    "keys": Command("pccl.tools.keys:keys_app", "Make keys, show them, and allow them."),
    "demo": Command("pccl.tools.demo.command:demo_command", "Train a model on this machine; one peer is killed, another joins."),
    "bench": Command("pccl.tools.bench.command:bench_app", "Measure: calls, next to gloo and MPI; losses, newcomers, memory, the master."),
    "stress": Command("pccl.tools.stress.command:stress_command", "Kill, freeze and let in peers on this machine, and check every result."),
    "version": Command("pccl.tools.version:version_command", "Print the version."),
}


def build(arguments: Sequence[str]) -> typer.Typer:
    """The app for a command line: the commands that it names are imported, of others there is only the line in the help."""
    app = typer.Typer(
        name="pccl",
        help="Collective communication that survives its peers.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_no_options)
    for name, command in COMMANDS.items():
        found = command.load() if name in arguments else None
        if found is None:
            app.command(name, help=command.help)(_not_loaded)
        elif isinstance(found, typer.Typer):
            app.add_typer(found, name=name, help=command.help)
        else:
            app.command(name)(found)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    before = signal.signal(signal.SIGINT, _interrupted)
    try:
        build(given)(given)
    except PcclError as error:
        print(f"pccl: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    finally:
        signal.signal(signal.SIGINT, before)


def exit_code(error: PcclError) -> int:
    """What the process ends with."""
    if isinstance(error, InvalidArgument):
        return USAGE
    if isinstance(error, ConnectError):
        return UNREACHABLE
    return TIMEOUT if isinstance(error, CollectiveTimeout) else FAILED


def _interrupted(number: int, frame: object) -> None:
    """Ctrl-C outside of an event loop: the end, without a traceback."""
    sys.exit(SIGNALLED + number)


def _no_options() -> None:
    """Collective communication that survives its peers."""


def _not_loaded() -> None:
    raise AssertionError("a command that the command line does not name was run")
