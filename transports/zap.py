"""Who may connect: the answers to libzmq's questions during a handshake (ZAP, ZeroMQ RFC 27).

Asked in plaintext, too: libzmq then accepts no peer that speaks a protocol from before there were mechanisms.
"""

from __future__ import annotations

import logging

import zmq

from pccl.core.address import key_text
from pccl.transports.keys import AllowList
from pccl.transports.zmq_common import Context, Pump, Socket

log = logging.getLogger(__name__)

DOMAIN = b"pccl"


class Gate:
    """Serves one context. Open before its sockets are bound, closed after they are."""

    def __init__(self, context: Context, *, curve: bool, allowed: AllowList | None) -> None:
        self._curve = curve
        self._allowed = allowed
        self._socket: Socket = context.socket(zmq.REP)
        self._socket.LINGER = 0
        self._socket.bind("inproc://zeromq.zap.01")
        self._pump = Pump(self._socket, self._answer_one)

    def close(self) -> None:
        """Answer no more. Handshakes that begin now fail: see `protect`."""
        self._pump.close()
        self._socket.close()

    def _answer_one(self) -> bool:
        try:
            request = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        version, number, _, host, _, mechanism, *credentials = request
        status, user = self._judge(host.decode().removeprefix("::ffff:"), mechanism, credentials)
        self._socket.send_multipart([version, number, status, b"OK" if status == b"200" else b"not allowed", user.encode(), b""])
        return True

    def _judge(self, host: str, mechanism: bytes, credentials: list[bytes]) -> tuple[bytes, str]:
        if not self._curve:
            return b"200" if mechanism == b"NULL" else b"400", ""
        if mechanism != b"CURVE" or len(credentials) != 1:
            return b"400", ""
        user = key_text(credentials[0])
        if self._allowed is not None and credentials[0] not in self._allowed:
            log.warning("refused a peer at %s: its key %s is not allowed", host, user)
            return b"400", user
        return b"200", user


def protect(socket: Socket) -> None:
    """Have a socket accept nobody whom the gate has not let in, even if there is no gate (any more)."""
    socket.ZAP_DOMAIN = DOMAIN
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
