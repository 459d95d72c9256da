"""`pccl master`."""

from __future__ import annotations

import asyncio
import shlex
from typing import Annotated

import typer

import pccl
from pccl.tools.process import log_to_stderr, run


def master_command(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to listen; port 0 takes a free one, host 0.0.0.0 or [::] every interface.")
    ] = f"127.0.0.1:{pccl.DEFAULT_PORT}",
    key: Annotated[str | None, typer.Option(metavar="FILE", help="This master's key, made by `pccl keys new`.")] = None,
    allow: Annotated[
        str | None, typer.Option(metavar="FILE", help="Public keys of the peers that may come; read again when it changes. Default: all.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without a key, in plain text.")] = False,
    advertise: Annotated[str | None, typer.Option(metavar="HOST[:PORT]", help="What peers are told, where that differs (a NAT).")] = None,
    heartbeat_interval: Annotated[float, typer.Option(metavar="S", help="Seconds between two heartbeats.")] = 0.5,
    heartbeat_timeout: Annotated[float, typer.Option(metavar="S", help="Seconds of silence after which a peer is lost.")] = 3.0,
    stall_timeout: Annotated[float, typer.Option(metavar="S", help="Seconds for which a call may stand still.")] = 30.0,
    log: Annotated[str, typer.Option(metavar="LEVEL", help="debug, info, warning or error; the log goes to stderr.")] = "info",
) -> None:
    """Serve a master until SIGINT or SIGTERM ends it.

    Prints the line that the next machine needs. A master that comes back at the same address takes over the groups of the one before.
    """
    log_to_stderr(log)
    options = pccl.Options(heartbeat_interval=heartbeat_interval, heartbeat_timeout=heartbeat_timeout, stall_timeout=stall_timeout)
    master = pccl.Master(listen, key=key, allow=allow, insecure=insecure, advertise=advertise, recover=True, options=options)
    run(_serve(master, needs_key=allow is not None))


async def _serve(master: pccl.Master, *, needs_key: bool) -> None:
    async with master:
        typer.echo(invitation(master.address, needs_key=needs_key))
        await asyncio.Event().wait()


def invitation(address: str, *, needs_key: bool = False) -> str:
    """What to paste on the next machine."""
    key = ', key="FILE"' if needs_key else ""
    return f'export PCCL_MASTER={shlex.quote(address)}\n# in Python: pccl.connect("{address}"{key})'
