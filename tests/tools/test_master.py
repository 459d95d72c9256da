"""`pccl master`."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

import pccl
from pccl.tools.cli import UNREACHABLE, USAGE
from pccl.tools.master import invitation
from tests.checks.processes import master_process
from tests.tools.test_cli import run

pytestmark = pytest.mark.process

QUICK = ("--heartbeat-interval", "0.1", "--heartbeat-timeout", "0.5")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_serves_until_a_signal(number: signal.Signals, code: int) -> None:
    async with master_process(*QUICK, stderr=asyncio.subprocess.PIPE) as (process, address):
        async with pccl.connect(address) as comm:
            assert comm.world_size == 1
        process.send_signal(number)
        _, log = await process.communicate()
        assert process.returncode == code
    assert b"leaves" in log
    assert b"Traceback" not in log


async def test_key_and_list(tmp_path: Path) -> None:
    key, peer, allowed = (str(tmp_path / name) for name in ("master.key", "peer.key", "allowed"))
    assert run("keys", "new", key) == run("keys", "new", peer) == 0
    public = pccl_public(peer)
    assert run("keys", "allow", allowed, public) == 0
    async with master_process("--key", key, "--allow", allowed, *QUICK) as (_, address):
        assert pccl_public(key) in address
        async with pccl.connect(address, key=peer) as comm:
            assert comm.world_size == 1
        with pytest.raises(pccl.AuthenticationError):
            await pccl.connect(address, key=key, connect_timeout=10)


def pccl_public(path: str) -> str:
    from pccl.core.address import key_text
    from pccl.transports.keys import load_keypair

    return key_text(load_keypair(path).public)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--listen", "0.0.0.0:0"], UNREACHABLE, "--insecure"),
        (["--listen", "nonsense:port"], USAGE, "not an address"),
        (["--listen", "::1:0"], USAGE, "[v6]:port"),
        (["--key", "no-such-file"], USAGE, "cannot be read"),
        (["--allow", "no-such-file"], USAGE, "without a key"),
        (["--heartbeat-timeout", "-1"], USAGE, "heartbeat_timeout"),
        (["--log", "loud"], USAGE, "loud"),
    ],
)
def test_errors(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("master", *arguments) == code
    assert message in capsys.readouterr().err


def test_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("master", "--listen", f"127.0.0.1:{port}") == UNREACHABLE
    assert f"port {port} is in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("advertise", "told"),
    [("example.org", r"example\.org:[1-9]\d*"), ("example.org:99", r"example\.org:99"), ("2001:db8::5", r"\[2001:db8::5\]:[1-9]\d*")],
)
async def test_advertised_address(advertise: str, told: str) -> None:
    async with master_process("--advertise", advertise) as (_, address):
        assert re.fullmatch(told, address)


async def test_ipv6() -> None:
    async with master_process("--listen", "[::1]:0", *QUICK) as (_, address):
        assert address.startswith("[::1]:")
        async with pccl.connect(address) as comm:
            assert comm.world_size == 1


async def test_comes_back_at_the_same_address() -> None:
    """Peers that run meanwhile notice nothing but a new term."""
    async with master_process(*QUICK) as (first, address), pccl.connect(address) as comm:
        before = comm.view.epoch
        first.kill()
        await first.wait()
        async with master_process("--listen", address, *QUICK, stderr=asyncio.subprocess.PIPE) as (second, again):
            assert again == address
            while (info := await comm.all_reduce(np.ones(1), retry=True)).epoch == before:
                pass
            assert info.epoch.term > before.term
            await comm.leave()
            second.send_signal(signal.SIGINT)
            _, log = await second.communicate()
    assert b"taken over with 1 members" in log


def test_invitation_survives_a_shell() -> None:
    assert invitation("host:1").splitlines()[0] == "export PCCL_MASTER=host:1"
    lines = invitation("pccl://host:1?key=abc", needs_key=True).splitlines()
    assert lines == ["export PCCL_MASTER='pccl://host:1?key=abc'", '# in Python: pccl.connect("pccl://host:1?key=abc", key="FILE")']
