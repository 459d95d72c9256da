"""Holds packets up: ``python -m tests.support.delay SECONDS NAMESPACE...`` delays what those namespaces receive on eth0, and nothing else.

Kernels without netem have NFQUEUE: packets wait in the kernel until this process, which sees nothing of them but a number, lets them go
on. It prints a line when it is ready, and ends with its standard input; whatever still waits then is dropped.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
import sys
import time
from collections import deque

QUEUE = 0
RULE = ("-t", "raw", "-A", "PREROUTING", "-i", "eth0", "-j", "NFQUEUE", "--queue-num", str(QUEUE))
"""For iptables in each of the namespaces"""

NETLINK_NETFILTER = 12
SUBSYSTEM = 3 << 8
PACKET, CONFIG, VERDICT_BATCH = SUBSYSTEM, SUBSYSTEM | 2, SUBSYSTEM | 3
BIND, COPY_META, HAND_OVER_UNSEGMENTED, ACCEPT = 1, 1, 4, 1
CLONE_NEWNET = 0x40000000


def message(kind: int, *attributes: tuple[int, bytes]) -> bytes:
    body = struct.pack("!BBH", 0, 0, QUEUE)
    for number, value in attributes:
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 1, 0, 0) + body


class Queue:
    """The packets of one namespace, in the order in which they came."""

    def __init__(self, namespace: str) -> None:
        with open(f"/run/netns/{namespace}", "rb") as where:
            if ctypes.CDLL(None, use_errno=True).setns(where.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        self.sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self.sock.setsockopt(270, 5, 1)  # NETLINK_NO_ENOBUFS
        self.sock.send(message(CONFIG, (1, struct.pack("!BBH", BIND, 0, 0))))
        flags = struct.pack("!I", HAND_OVER_UNSEGMENTED)
        self.sock.send(message(CONFIG, (2, struct.pack("!IB", 0, COPY_META)), (3, struct.pack("!I", 1 << 20)), (4, flags), (5, flags)))
        self.sock.setblocking(False)
        self.waiting: deque[tuple[float, int]] = deque()
        """When a packet is due, and its number"""

    def take(self, due: float) -> None:
        """Note what has come."""
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == PACKET:  # the packet's own header, with its number, is the first attribute
                    self.waiting.append((due, struct.unpack_from("!I", data, 24)[0]))
                data = data[(length + 3) & ~3 :]

    def release(self, now: float) -> None:
        """Let go on what is due."""
        last = None
        while self.waiting and self.waiting[0][0] <= now:
            last = self.waiting.popleft()[1]
        if last is not None:
            self.sock.send(message(VERDICT_BATCH, (2, struct.pack("!II", ACCEPT, last))))


def main() -> None:
    delay, queues = float(sys.argv[1]), [Queue(name) for name in sys.argv[2:]]
    print("ready", flush=True)
    socks = [queue.sock for queue in queues]
    while True:
        soonest = min((queue.waiting[0][0] for queue in queues if queue.waiting), default=None)
        readable, _, _ = select.select([0, *socks], [], [], None if soonest is None else max(0.0, soonest - time.monotonic()))
        if 0 in readable and not os.read(0, 1):
            return
        now = time.monotonic()
        for queue in queues:
            queue.take(now + delay)
            queue.release(time.monotonic())


if __name__ == "__main__":
    main()
