"""What a TCP connection asks its kernel for, which differs within a host and between hosts."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest

from pccl.transports import tcp
from pccl.transports.tcp import STRIPES, UNSENT, TcpWire, is_near

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has these")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The ends of a connection on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            yield near, far


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection leads to another host."""
    monkeypatch.setattr(tcp, "is_near", lambda sock: False)
    monkeypatch.setattr(TcpWire, "_without", False)


def option(sock: socket.socket, number: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, number)


async def test_loopback_is_near(pair: tuple[socket.socket, socket.socket]) -> None:
    plain = option(pair[1], socket.TCP_USER_TIMEOUT)
    assert all(map(is_near, pair))
    wire = TcpWire(pair[0], user_timeout=7.0)
    assert wire.stripes == 1
    assert option(pair[0], socket.TCP_NODELAY)
    assert option(pair[0], socket.TCP_USER_TIMEOUT) == plain
    wire.close()


@pytest.mark.usefixtures("far")
@pytest.mark.parametrize("seconds", [7.0, 1e300])
async def test_between_hosts(pair: tuple[socket.socket, socket.socket], seconds: float) -> None:
    buffers = [pair[0].getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
    wire = TcpWire(pair[0], user_timeout=seconds)
    assert wire.stripes == STRIPES
    assert option(pair[0], socket.TCP_USER_TIMEOUT) == min(seconds * 1000, (1 << 31) - 1)
    assert option(pair[0], tcp._TCP_NOTSENT_LOWAT) == UNSENT
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert [pair[0].getsockopt(socket.SOL_SOCKET, which) for which in (socket.SO_SNDBUF, socket.SO_RCVBUF)] == buffers
    wire.close()


@pytest.mark.usefixtures("far")
async def test_congestion_control_that_is_not_to_be_had_is_logged_once(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp, "_CONGESTION", "nosuch")
    caplog.set_level(logging.INFO, "pccl.link")
    for sock in pair:
        TcpWire(sock).close()
    (record,) = caplog.records
    assert "NOSUCH congestion control" in record.getMessage()
    assert "tcp_allowed_congestion_control" in record.getMessage()


@pytest.mark.usefixtures("far")
async def test_bbr_is_asked_for(pair: tuple[socket.socket, socket.socket]) -> None:
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        except OSError:
            pytest.skip("this kernel has no BBR, or not for everyone")
    pair[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    wire = TcpWire(pair[0])
    assert pair[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"bbr"
    wire.close()


async def test_an_account_says_what_was_acknowledged(pair: tuple[socket.socket, socket.socket]) -> None:
    wire = TcpWire(pair[0])
    before = wire.account()
    assert before
    wire.write([b"x" * 1000])
    pair[1].recv(1000, socket.MSG_WAITALL)
    while (after := wire.account()) and after.acked - before.acked < 1000:
        pass
    assert after
    assert after.acked - before.acked == 1000
    assert after.rtt > 0
    wire.close()
    assert wire.account() is None
