"""From what a caller gives to `connect`, to an engine."""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypedDict

from pccl.core.address import Address, is_loopback, parse_address, parse_endpoint
from pccl.core.errors import InvalidArgument
from pccl.core.options import Options
from pccl.engine import Engine

if TYPE_CHECKING:
    from pccl.transports.region import Region

logger = logging.getLogger("pccl")

TRANSPORTS = ("auto", "tcp")


class Settings(TypedDict, total=False):
    """Keywords of `connect`; those of `Options` are taken, too, under their names."""

    name: str
    """What errors and logs call this peer. Default ``host:pid``."""
    listen: str
    """``host`` or ``host:port`` where this peer accepts links; default: loopback if the master is there, else every interface."""
    advertise: str
    """``host`` or ``host:port`` where others reach it, if that differs (a NAT, a container)."""
    transport: str
    """"auto" (the default): peers of one host share memory; "tcp": they do as if they were on two."""
    host: str
    """Who gives the same text counts as being on one host; default: whoever is on one machine, in one network namespace. Those share
    memory if they can, and what moves between hosts is kept small."""
    key: str
    """Path of this peer's own key file, where the master has an allow-list."""
    timeout: float | None
    connect_timeout: float | None
    heartbeat_interval: float
    heartbeat_timeout: float
    stall_timeout: float
    takeover_timeout: float
    dial_timeout: float
    path_timeout: float
    log_waiting: float
    min_world_size: int
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything checked; `engine` makes the engine, to be called on its loop."""

    options: Options
    engine: Callable[[], Engine]


def prepare(address: str, group: str, settings: Settings) -> Prepared:
    """Check what a caller gave.

    Raises:
        InvalidArgument: something is not allowed; says what.
    """
    from pccl.transports.keys import load_keypair

    master = parse_address(address)
    if not isinstance(group, str) or not 1 <= len(group) <= 256:
        raise InvalidArgument(f"group: a name of 1 to 256 characters is needed, not {group!r}")
    given = dict(settings)
    names = {"name", "listen", "advertise", "host", "key", "transport"}
    known = {f.name for f in fields(Options)}
    unknown = given.keys() - names - known
    if unknown:
        raise InvalidArgument(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(sorted(names | known))}")
    options = Options(**{k: v for k, v in given.items() if k in known})  # type: ignore[arg-type]
    text = {k: _text(k, given.get(k)) for k in names}
    listen = parse_endpoint(text["listen"], "listen") if text["listen"] else default_listen(master)
    advertise = parse_endpoint(text["advertise"], "advertise") if text["advertise"] else default_advertise(master, listen)
    if len(text["host"]) > 256:
        raise InvalidArgument(f"host: text of at most 256 characters is needed, not {len(text['host'])}")
    keypair = load_keypair(text["key"]) if text["key"] else None
    if text["transport"] not in ("", *TRANSPORTS):
        raise InvalidArgument(f"transport: one of {', '.join(map(repr, TRANSPORTS))} is needed, not {text['transport']!r}")

    def make() -> Engine:
        from pccl.transports.local import HostTransport
        from pccl.transports.tcp import TcpTransport
        from pccl.transports.zmq_client import ZmqClient

        region = None if text["transport"] == "tcp" else open_region()
        where, limit = (listen[0], listen[1] or 0), options.stall_timeout
        host = text["host"] or host_identity()
        local = region and HostTransport(*where, advertise=advertise, user_timeout=limit, identity=host, region=region)
        return Engine(
            ZmqClient(master, keypair=keypair, heartbeat_interval=options.heartbeat_interval, heartbeat_timeout=options.heartbeat_timeout),
            local or TcpTransport(*where, advertise=advertise, user_timeout=limit),
            group=group,
            name=text["name"] or f"{socket.gethostname()}:{os.getpid()}",
            host=host,
            key=uuid.uuid4().bytes,
            address=address,
            options=options,
            region=region,
        )

    return Prepared(options, make)


def open_region() -> Region | None:
    """Memory to share with other peers of this host; None where that cannot be."""
    from pccl.collectives.lane import ROOM
    from pccl.transports.region import Region, supported

    if not supported():
        return None
    try:
        return Region(ROOM, ROOM + os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # only what is used takes room
    except (OSError, ValueError) as e:
        logger.warning("no memory can be shared with other peers of this host (%s): they will be reached by TCP", e)
        return None


def _text(name: str, value: object) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    raise InvalidArgument(f"{name}: text is needed, not {value!r}")


def default_listen(master: Address) -> tuple[str, int | None]:
    """Loopback where the master is there, every interface otherwise."""
    if is_loopback(master.host):
        return ("::1" if ":" in master.host else "127.0.0.1"), None
    return "", None


def default_advertise(master: Address, listen: tuple[str, int | None]) -> tuple[str, int | None] | None:
    """The address of the interface that leads to the master, where this peer listens on every interface. No packet is sent."""
    if listen[0] not in ("", "0.0.0.0", "::"):
        return None
    try:
        family, kind, _, _, where = socket.getaddrinfo(master.host, master.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0]), listen[1]
    except OSError:
        return socket.gethostname(), listen[1]


@functools.cache
def host_identity() -> str:
    """What peers on this machine, in this network namespace, have in common: they can talk without a network."""
    parts = [socket.gethostname()]
    try:
        parts += [pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    except OSError:
        pass  # not Linux
    return str(uuid.uuid5(uuid.NAMESPACE_OID, "|".join(parts)))
