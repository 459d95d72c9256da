"""Check 35: names, IPv6, and addresses that differ from where a process listens."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

import pccl
from pccl.communicator import Communicator
from tests.checks.support import QUICK, each, members
from tests.checks.support_state import newcomer, sync, tensor
from tests.tools.test_cli import run


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")


def dialled(comms: list[Communicator]) -> set[str]:
    """The addresses of the far ends of all links, where they were dialled."""
    links = [flow.link for c in comms for flow in c._runtime.engine.executor.flows.values() if flow.link]
    return {link._first.wire._sock.getpeername()[0] for link in links}  # type: ignore[attr-defined]


async def works(comms: list[Communicator]) -> None:
    tensors = [np.full(300_000, 1.0 + k, np.float32) for k in range(len(comms))]
    await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)
    await sync(comms, [{"w": tensor(4096, k == 0)} for k in range(len(comms))], [2, *[1] * (len(comms) - 1)])


@pytest.mark.parametrize("scheme", ["", "pccl://", "tcp://"])
async def test_check_35_names(scheme: str) -> None:
    async with pccl.Master("localhost:0") as master:
        port = master.address.rpartition(":")[2]
        async with members(f"{scheme}localhost:{port}", 3, listen="localhost", transport="tcp") as comms:
            await works(comms)


@needs_ipv6
async def test_check_35_ipv6() -> None:
    async with pccl.Master("[::1]:0") as master:
        assert master.address.startswith("[::1]:")
        async with members(master.address, 3, transport="tcp") as comms:
            await works(comms)
            assert dialled(comms) == {"::1"}


@needs_ipv6
async def test_check_35_a_group_of_both_families() -> None:
    async with pccl.Master("[::1]:0") as master:
        async with (
            members(master.address, 2, transport="tcp") as six,
            members(master.address, 1, group="other", listen="127.0.0.1", transport="tcp") as other,
        ):
            await works(six)
            await works(other)
        hosts = ["127.0.0.1", "::1", "[::1]:0", "localhost"]
        connects = [
            pccl.connect(master.address, listen=host, group="both", min_world_size=4, **(QUICK | {"transport": "tcp"})) for host in hosts
        ]
        comms = await each(connects)
        await works(comms)
        assert dialled(comms) == {"127.0.0.1", "::1"}
        await each(c.close() for c in comms)


async def test_check_35_an_advertised_address_is_what_others_dial() -> None:
    """All of 127.0.0.0/8 is this machine: each peer is known under an address that it does not listen on by name."""
    async with pccl.Master("127.0.0.1:0", advertise="127.0.0.9") as master:
        assert master.address.startswith("127.0.0.9:")
        with pytest.raises(pccl.ConnectError):  # it listens on 127.0.0.1 alone, so what it says is not true
            await pccl.connect(master.address, connect_timeout=0.5)
        address = master.address.replace("127.0.0.9", "127.0.0.1")
        connects = [
            pccl.connect(address, listen="0.0.0.0", advertise=f"127.0.0.{2 + k}", min_world_size=3, **(QUICK | {"transport": "tcp"}))
            for k in range(3)
        ]
        comms = await each(connects)
        await works(comms)
        assert dialled(comms) - {"127.0.0.1"}
        assert dialled(comms) <= {"127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"}
        await each(c.close() for c in comms)


async def test_check_35_a_port_can_be_chosen_and_advertised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with pccl.Master() as master:
            with pytest.raises(pccl.ConnectError, match=str(port)):
                await pccl.connect(master.address, listen=f"127.0.0.1:{port}", **QUICK)
    async with pccl.Master() as master:
        where = {"listen": f"127.0.0.1:{port}", "advertise": f"localhost:{port}"}
        async with members(master.address, 1, transport="tcp", **where) as first, newcomer(master.address, first) as new:
            await works([*first, new])
            (flow,) = new._runtime.engine.executor.flows.values()
            assert flow.link._first.wire._sock.getpeername() == ("127.0.0.1", port)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("no-such-host.invalid:48148", pccl.ConnectError, "no-such-host.invalid"),
        ("127.0.0.1:1", pccl.MasterUnreachable, "127.0.0.1:1"),
        ("[::1:48148", pccl.InvalidArgument, "address"),
        ("host:port", pccl.InvalidArgument, "address"),
        ("http://localhost:1", pccl.InvalidArgument, "address"),
    ],
)
async def test_check_35_what_is_no_address_or_nobody_there_is_said(address: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("[", "\\[")):
        await pccl.connect(address, connect_timeout=0.5)


async def test_check_35_off_loopback_a_master_wants_a_key(tmp_path: Path) -> None:
    with pytest.raises(pccl.PcclError, match="insecure"):
        await pccl.Master("0.0.0.0:0").start()
    key = str(tmp_path / "master.key")
    assert run("keys", "new", key) == 0
    async with pccl.Master("0.0.0.0:0", key=key, advertise="127.0.0.1") as master:
        assert master.address.startswith("pccl://127.0.0.1:")
        async with members(master.address, 2, transport="tcp") as comms:
            await works(comms)
