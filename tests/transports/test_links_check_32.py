"""Check 32: whatever strangers send to whichever port, they are sent away in time, nothing swells, and a run beside them goes on."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pccl
from pccl.core.frames import MAX_PAYLOAD, Header, Kind, pack_header
from pccl.transports.keys import new_keypair, save_keypair
from pccl.transports.wire import HELLO, MAGIC, VERSION
from tests.checks.support import each, members
from tests.support.leaks import descriptors
from tests.support.links import EPOCH

LIMIT = 20.0
"""Seconds for what takes 3 and a heartbeat, on a machine that is busy."""
MEMORY = 64 << 20

ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
ZMTP_READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
ZMTP_READY_FRAME = bytes([4, len(ZMTP_READY)]) + ZMTP_READY
ZMTP_HUGE = struct.pack(">BQ", 2, 1 << 62)
LINK_HELLO = HELLO.pack(MAGIC, VERSION, 1, 2, 0, bytes(16))

NASTY: dict[str, Callable[[random.Random], bytes]] = {
    "nothing": lambda rng: b"",
    "one byte": lambda rng: rng.randbytes(1),
    "noise": lambda rng: rng.randbytes(1 << 20),
    "zeros": lambda rng: bytes(1 << 20),
    "another protocol": lambda rng: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
    "a frame of absurd length": lambda rng: pack_header(Header(Kind.DATA, EPOCH, length=(1 << 32) - 1)) + rng.randbytes(1 << 16),
    "a long frame": lambda rng: pack_header(Header(Kind.DATA, EPOCH, length=MAX_PAYLOAD)) + rng.randbytes(1 << 16),
    "half a hello": lambda rng: LINK_HELLO[: rng.randrange(1, HELLO.size)],
    "a hello": lambda rng: LINK_HELLO,
    "half a greeting": lambda rng: ZMTP_GREETING[: rng.randrange(1, 64)],
    "a greeting": lambda rng: ZMTP_GREETING,
    "a greeting and noise": lambda rng: ZMTP_GREETING + rng.randbytes(1 << 16),
    "a greeting and a huge command": lambda rng: ZMTP_GREETING + struct.pack(">BQ", 6, 1 << 62) + rng.randbytes(1 << 16),
    "a peer without a pulse": lambda rng: ZMTP_GREETING + ZMTP_READY_FRAME,
    "a peer with a huge message": lambda rng: ZMTP_GREETING + ZMTP_READY_FRAME + ZMTP_HUGE + rng.randbytes(1 << 16),
    "a peer with half a message": lambda rng: ZMTP_GREETING + ZMTP_READY_FRAME + struct.pack(">BQ", 2, 16 << 20) + rng.randbytes(1 << 16),
    "a peer that talks nonsense": lambda rng: ZMTP_GREETING + ZMTP_READY_FRAME + b"\x00\xc8" + rng.randbytes(200),
}


def listeners() -> set[int]:
    """Ports at which this process listens."""
    mine = {target[8:-1] for _, target in descriptors() if target.startswith("socket:")}
    ports = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as file:
            for line in list(file)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in mine:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def visit(port: int, what: bytes, way: str) -> None:
    """Connect, say something, and be sent away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        if way == "byte by byte":
            for k in range(min(len(what), 300)):
                writer.write(what[k : k + 1])
                await writer.drain()
                await asyncio.sleep(0)
        else:
            writer.write(what)
        if way == "half open":
            await writer.drain()
            writer.write_eof()
        while await reader.read(1 << 16):
            pass
    except OSError:  # sent away while it spoke
        pass
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("curve", [False, True], ids=["plain", "keys"])
@pytest.mark.parametrize("way", ["at once", "byte by byte", "half open"])
async def test_check_32_strangers_at_every_port(way: str, curve: bool, tmp_path: Path) -> None:
    rng = random.Random(way)
    key = tmp_path / "master.key"
    save_keypair(key, new_keypair())
    before = listeners()
    async with pccl.Master(key=str(key) if curve else None) as master, members(master.address, 3) as comms:
        ports = listeners() - before
        assert len(ports) == 4  # the master, and the links of three peers
        view = comms[0].view
        visits = asyncio.gather(*(visit(port, make(rng), way) for port in sorted(ports) for make in NASTY.values()))
        at_first, rounds = resident(), 0
        highest = at_first
        async with asyncio.timeout(LIMIT):
            while not visits.done() or rounds < 10:
                tensors = [np.arange(5000.0) + k for k in range(3)]
                await each(comm.all_reduce(x) for comm, x in zip(comms, tensors, strict=True))
                assert all(np.array_equal(x, 3 * np.arange(5000.0) + 3) for x in tensors)
                rounds += 1
                highest = max(highest, resident())
        await visits
        await each(comm.update() for comm in comms)
        assert {comm.view.epoch for comm in comms} == {view.epoch}
        assert highest - at_first < MEMORY
