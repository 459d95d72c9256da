"""`pccl keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pccl.core.address import key_text, parse_key
from pccl.core.errors import InvalidArgument
from pccl.transports.keys import load_allowed, load_keypair, new_keypair, save_keypair

keys_app = typer.Typer(no_args_is_help=True)


@keys_app.command("new")
def new_command(file: Annotated[Path, typer.Argument(help="Where to keep it; must not exist.")]) -> None:
    """Make a key pair in a file that only you can read, and print its public key."""
    pair = new_keypair()
    save_keypair(file, pair)
    typer.echo(key_text(pair.public))


@keys_app.command("show")
def show_command(file: Annotated[Path, typer.Argument(help="A file that `pccl keys new` made.")]) -> None:
    """Print the public key of a key pair."""
    typer.echo(key_text(load_keypair(file).public))


# A public key may begin with a dash.
@keys_app.command("allow", context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
def allow_command(
    allowed: Annotated[Path, typer.Argument(metavar="LIST", help="The list of keys; made if it does not exist.")],
    key: Annotated[str, typer.Argument(help="A public key as `pccl keys show` prints it.")],
    name: Annotated[str, typer.Argument(help="Whose it is.")] = "",
) -> None:
    """Add a public key to a list of those that may connect (`pccl master --allow LIST`)."""
    public = parse_key(key)
    if any(c in name for c in "#\n\r"):
        raise InvalidArgument(f"name: one line without # is needed, not {name!r}")
    known = load_allowed(allowed) if allowed.exists() else {}
    if public in known:
        typer.echo(f"{key} is in {allowed} already{f', as {known[public]}' if known[public] else ''}", err=True)
        return
    try:
        with allowed.open("a+") as file:
            file.write(f"{_line_break(allowed)}{key_text(public)} {name}".rstrip(" ") + "\n")
    except OSError as error:
        raise InvalidArgument(f"{allowed}: cannot be written ({error.strerror})") from None


def _line_break(path: Path) -> str:
    """What ends the last line, where an editor did not."""
    text = path.read_text()
    return "\n" if text and not text.endswith("\n") else ""
