"""Bad input: a typed error that says which argument, what was given, and what is allowed; and the communicator goes on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

import pccl
from pccl import sync
from pccl.communicator import Communicator
from pccl.core.messages import PROTOCOL_VERSION
from pccl.protocol import peer as peer_module
from tests.checks.support import each, group, in_threads, outcomes

Array = np.ndarray[Any, Any]


@pytest.fixture
async def comms() -> AsyncIterator[list[Communicator]]:
    async with group(2) as both:
        yield both


async def works(comms: list[Communicator]) -> None:
    tensors = [np.full(10, k + 1.0) for k in range(len(comms))]
    await each(c.all_reduce(x) for c, x in zip(comms, tensors, strict=True))
    assert all((x == sum(range(1, len(comms) + 1))).all() for x in tensors)


def read_only(n: int) -> Array:
    x = np.ones(n, np.float32)
    x.flags.writeable = False
    return x


def f32(n: int) -> Array:
    return np.ones(n, np.float32)


BASE = np.ones(30, np.float32)

WRONG: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    # dtypes
    "strings": (lambda c: c.all_reduce(np.array(["a"])), ["x", "<U1", "float32"]),
    "objects": (lambda c: c.all_reduce(np.array([None])), ["x", "object", "float32"]),
    "datetime": (lambda c: c.all_reduce(np.zeros(2, "M8[s]")), ["x", "datetime64", "float32"]),
    "longdouble": (lambda c: c.all_reduce(np.zeros(2, np.longdouble)), ["x", "float128", "float64"]),
    "structured": (lambda c: c.all_reduce(np.zeros(2, "f4,i4")), ["x", "float32"]),
    "byte order": (lambda c: c.all_reduce(np.zeros(2, ">f4")), ["x", ">f4", "byte order"]),
    "a number": (lambda c: c.all_reduce(3.0), ["x", "float", "numpy array"]),
    "a list of numbers": (lambda c: c.all_reduce([1.0, 2.0]), ["x[0]", "float"]),
    "None": (lambda c: c.all_reduce(None), ["x", "NoneType"]),
    "an empty list": (lambda c: c.all_reduce([]), ["x", "at least one"]),
    "a list of two dtypes": (lambda c: c.all_reduce([f32(2), np.ones(2)]), ["x[1]", "float32", "float64"]),
    "out of another dtype": (lambda c: c.all_reduce(f32(4), out=np.ones(4)), ["out", "float64", "float32"]),
    # read-only and overlapping
    "read-only in place": (lambda c: c.all_reduce(read_only(4)), ["x", "read-only"]),
    "bytes": (lambda c: c.all_reduce(b"abcd"), ["x", "read-only"]),
    "read-only output": (lambda c: c.all_reduce(f32(4), out=read_only(4)), ["out", "read-only"]),
    "read-only to receive": (lambda c: c.recv(read_only(4), 1 - c.rank), ["x", "read-only"]),
    "overlapping": (lambda c: c.all_reduce(BASE[:20], out=BASE[5:25]), ["out", "overlaps x"]),
    "all_to_all in place": (lambda c: c.all_to_all(BASE[:20], out=BASE[:20]), ["out", "overlap"]),
    "all_gather over another part": (lambda c: c.all_gather(BASE[(1 - c.rank) * 4 :][:4], out=BASE[:8]), ["overlaps", "own part"]),
    "elements that share memory": (lambda c: c.all_reduce(np.lib.stride_tricks.as_strided(f32(9), (4, 4), (4, 4))), ["x", "share memory"]),
    "tensors that share memory": (lambda c: c.all_reduce([BASE[:4], BASE[2:6]]), ["x", "share memory"]),
    # sizes
    "out too short": (lambda c: c.all_reduce(f32(4), out=f32(3)), ["out", "3", "4"]),
    "not a multiple": (lambda c: c.reduce_scatter(f32(5)), ["x", "5", "2"]),
    "all_to_all of an odd number": (lambda c: c.all_to_all(f32(7)), ["x", "7", "2"]),
    "all_gather into too little": (lambda c: c.all_gather(f32(4), out=f32(7)), ["out", "7", "2 times", "4"]),
    "scatter of too much": (lambda c: c.scatter(f32(4), f32(9), root=c.rank), ["x", "9", "2 times", "4"]),
    "scatter of nothing": (lambda c: c.scatter(f32(4), root=c.rank), ["x", "root"]),
    # operators and algorithms
    "unknown op": (lambda c: c.all_reduce(f32(4), "mean"), ["op", "'mean'", "'avg'"]),
    "op of another type": (lambda c: c.all_reduce(f32(4), 3), ["op", "3", "'sum'"]),
    "op that the dtype does not have": (lambda c: c.all_reduce(f32(4), "band"), ["op", "'band'", "float32", "sum"]),
    "avg of integers": (lambda c: c.all_reduce(np.ones(4, np.int32), "avg"), ["op", "'avg'", "int32", "sum"]),
    "premul_sum without a factor": (lambda c: c.all_reduce(f32(4), "premul_sum"), ["op", "premul_sum", "factor"]),
    "unknown algorithm": (lambda c: c.all_reduce(f32(4), algorithm="magic"), ["algorithm", "'magic'", "ring", "auto"]),
    "algorithm of another collective": (lambda c: c.broadcast(f32(4), algorithm="star"), ["algorithm", "'star'", "broadcast", "tree"]),
    "accumulate": (lambda c: c.all_reduce(f32(4), accumulate="float64"), ["accumulate", "'float64'", "float32"]),
    "accumulate of whole floats": (lambda c: c.all_reduce(f32(4), accumulate="float32"), ["accumulate", "float32", "float16"]),
    # ranks
    "root too large": (lambda c: c.broadcast(f32(4), root=2), ["root", "2", "0 to 1"]),
    "negative root": (lambda c: c.reduce(f32(4), root=-1), ["root", "-1", "0 to 1"]),
    "root of another type": (lambda c: c.gather(f32(4), root="0"), ["root", "'0'", "0 to 1"]),
    "send to itself": (lambda c: c.send(f32(4), c.rank), ["dst", "itself"]),
    "recv from nobody": (lambda c: c.recv(f32(4), 7), ["src", "7", "0 to 1"]),
    "subgroup of a rank twice": (lambda c: c.subgroup([0, 0]), ["ranks", "[0, 0]", "once"]),
    "subgroup of nobody": (lambda c: c.subgroup([]), ["ranks", "[]"]),
    "split by a string": (lambda c: c.split("red"), ["color", "'red'", "integer"]),
    # keywords
    "negative timeout": (lambda c: c.all_reduce(f32(4), timeout=-1), ["timeout", "-1", "at least 0"]),
    "timeout is no number": (lambda c: c.all_reduce(f32(4), timeout="1"), ["timeout", "'1'", "seconds"]),
    "timeout is nan": (lambda c: c.all_reduce(f32(4), timeout=float("nan")), ["timeout", "nan"]),
    "negative timeout of update": (lambda c: c.update(timeout=-0.5), ["timeout", "-0.5"]),
    "negative timeout of sync_state": (lambda c: c.sync_state({"x": f32(4)}, 1, timeout=-2), ["timeout", "-2"]),
    "tag of another type": (lambda c: c.all_reduce(f32(4), tag=1.5), ["tag", "1.5", "string"]),
    "retry without atomic": (lambda c: c.all_reduce(f32(4), retry=True, atomic=False), ["retry", "atomic=False"]),
    "unknown keyword": (lambda c: c.all_reduce(f32(4), quantise="uint8"), ["quantise", "timeout"]),
    # sync_state
    "unknown strategy": (lambda c: c.sync_state({"x": f32(4)}, 1, strategy="mine"), ["strategy", "'mine'", "elect"]),
    "a value that cannot be shared": (lambda c: c.sync_state({"x": object()}, 1), ["x", "object"]),
    "a negative revision": (lambda c: c.sync_state({"x": f32(4)}, -1), ["revision", "-1"]),
}


async def call(comm: Communicator, wrong: Callable[[Any], Any]) -> Any:
    return await wrong(comm)


@pytest.mark.parametrize("what", WRONG)
async def test_bad_arguments_of_calls(what: str, comms: list[Communicator]) -> None:
    """On the peer that gives them, at once, with no place taken in the order of calls: the peers' next calls are the same one."""
    wrong, texts = WRONG[what]
    before = BASE.copy()
    (error,) = await outcomes([call(comms[0], wrong)], within=5.0)
    assert isinstance(error, pccl.InvalidArgument), error
    assert isinstance(error, ValueError)
    for text in texts:
        assert text in str(error), f"{text!r} is not in: {error}"
    assert (before == BASE).all()
    await works(comms)


def test_bad_arguments_of_blocking_calls() -> None:
    """The same checks; none of the errors hangs or breaks anything."""

    def body(comm: sync.Communicator) -> int:
        found = 0
        for what, (wrong, texts) in WRONG.items():
            with pytest.raises(pccl.InvalidArgument) as caught:
                wrong(comm)
            assert all(text in str(caught.value) for text in texts), what
            found += 1
        x = np.full(4, comm.rank + 1.0)
        comm.all_reduce(x)
        assert (x == 3).all()
        return found

    assert in_threads(2, body) == [len(WRONG)] * 2


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
async def test_shapes_that_differ_between_peers(in_place: bool) -> None:
    async with group(3) as comms:
        tensors = [np.ones((4, 5)), np.ones((4, 5)), np.ones((4, 6))]
        outs = [None if in_place else np.zeros_like(x) for x in tensors]
        for error in await outcomes(c.all_reduce(x, out=y) for c, x, y in zip(comms, tensors, outs, strict=True)):
            assert isinstance(error, pccl.CollectiveMismatch), error
            assert "float64[20]" in str(error)
            assert "float64[24]" in str(error)
        assert all((x == 1).all() for x in tensors)
        await works(comms)
        same_count = [np.ones((4, 5)), np.ones((5, 4)), np.ones(20)]  # elements count, not shapes: documented at all_reduce
        await each(c.all_reduce(x) for c, x in zip(comms, same_count, strict=True))
        assert all((x == 3).all() for x in same_count)


async def test_a_bad_call_in_a_round(comms: list[Communicator]) -> None:
    """The body raises where the bad call stands; so the round fails for all, and the good calls are undone."""
    tensors = [np.full(10, k + 1.0) for k in range(2)]

    async def run(comm: Communicator, x: Array, op: str) -> None:
        async with comm.round() as r:
            r.all_reduce(x)
            r.all_reduce(f32(4), op)

    bad, other = await outcomes((run(comms[0], tensors[0], "mean"), run(comms[1], tensors[1], "sum")), within=10.0)
    assert isinstance(bad, pccl.InvalidArgument), bad
    assert "'mean'" in str(bad)
    assert isinstance(other, pccl.CollectiveAborted), other
    assert "'mean'" in str(other)
    assert (tensors[0] == 1).all()
    assert (tensors[1] == 2).all()
    await works(comms)

    async def odd() -> None:
        async with comms[0].round(tag="odd") as r:
            r.all_reduce(tensors[0], tag=1, timeout=3)

    with pytest.raises(pccl.InvalidArgument, match="tag, timeout"):
        await odd()
    await works(comms)


async def test_calls_after_close(comms: list[Communicator]) -> None:
    await comms[0].close()
    for _ in range(2):
        await comms[0].close()
        await comms[0].leave()
        for use in (lambda c: c.all_reduce(f32(4)), lambda c: c.update(), lambda c: c.sync_state({"x": f32(4)}, 1), lambda c: c.split(0)):
            (error,) = await outcomes([call(comms[0], use)], within=5.0)
            assert isinstance(error, pccl.InvalidArgument), error
            assert "closed" in str(error)
            assert "connect again" in str(error)
    with pytest.raises(pccl.InvalidArgument, match="closed"):
        async with comms[0].round() as r:
            r.barrier()
    assert "closed" in repr(comms[0])
    (error,) = await outcomes([comms[1].all_reduce(f32(4))])
    assert isinstance(error, pccl.CollectiveAborted)
    await works(comms[1:])


async def test_calls_in_flight_at_close(comms: list[Communicator]) -> None:
    x = np.ones(100_000)
    running = asyncio.ensure_future(comms[0].all_reduce(x))
    await asyncio.sleep(0)
    await comms[0].close()
    (error,) = await outcomes([running], within=5.0)
    assert isinstance(error, pccl.Evicted), error
    assert "closed" in str(error)
    assert (x == 1).all()


def test_blocking_calls_after_close() -> None:
    def body(comm: sync.Communicator) -> None:
        comm.barrier()
        comm.leave()
        comm.leave()
        comm.close()
        for use in (lambda: comm.barrier(), lambda: comm.update(), lambda: comm.barrier(async_op=True)):
            with pytest.raises(pccl.InvalidArgument, match="closed"):
                use()

    in_threads(2, body)


# --- connecting ---------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "no address": ("", {}, ["address", "''"]),
    "a port that is none": ("localhost:http", {}, ["address", "http"]),
    "a port too large": ("localhost:70000", {}, ["address", "70000"]),
    "a number": (48148, {}, ["address", "48148"]),
    "a key that is none": ("pccl://localhost:48148?key=abc", {}, ["key", "abc"]),
    "a negative timeout": ("localhost:48148", {"timeout": -1.0}, ["timeout", "-1.0", "above 0"]),
    "a negative connect_timeout": ("localhost:48148", {"connect_timeout": -3}, ["connect_timeout", "-3"]),
    "a heartbeat of 0": ("localhost:48148", {"heartbeat_interval": 0}, ["heartbeat_interval", "0"]),
    "a min_world_size of 0": ("localhost:48148", {"min_world_size": 0}, ["min_world_size", "0", "at least 1"]),
    "a min_world_size that is no integer": ("localhost:48148", {"min_world_size": 1.5}, ["min_world_size", "1.5"]),
    "an unknown setting": ("localhost:48148", {"colour": "red"}, ["colour", "min_world_size"]),
    "a group without a name": ("localhost:48148", {"group": ""}, ["group", "''"]),
    "a name that is none": ("localhost:48148", {"name": 7}, ["name", "7", "text"]),
    "a host that is none": ("localhost:48148", {"host": 7}, ["host", "7", "text"]),
    "a host id that is too long": ("localhost:48148", {"host": 300 * "x"}, ["host", "300", "256"]),
    "listen that is none": ("localhost:48148", {"listen": "host:port:x"}, ["listen", "host:port:x"]),
    "a key file that is not there": ("localhost:48148", {"key": "/nowhere/peer.key"}, ["/nowhere/peer.key"]),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_bad_settings(what: str) -> None:
    """At once, before anything is opened, by either face."""
    address, settings, texts = SETTINGS[what]
    for connect in (pccl.connect, sync.connect):
        with pytest.raises(pccl.InvalidArgument) as caught:
            connect(address, **settings)
        assert all(text in str(caught.value) for text in texts), caught.value


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


async def test_a_master_that_is_not_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(pccl.MasterUnreachable, match=r"no pccl master answered at .* within 0\.3 s") as caught:
        await pccl.connect(address, connect_timeout=0.3)
    assert address in str(caught.value)
    with pytest.raises(pccl.MasterUnreachable):
        await asyncio.to_thread(sync.connect, address, connect_timeout=0.3)


async def test_something_else_at_the_masters_address() -> None:
    """It accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(pccl.ConnectError) as caught:
            await pccl.connect(address, connect_timeout=0.5)
        assert address in str(caught.value)


async def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(pccl.ConnectError, match=r"nowhere\.invalid"):
        await pccl.connect("nowhere.invalid:48148", connect_timeout=1.0)
    async with pccl.Master() as master:
        with pytest.raises(pccl.ConnectError, match=r"listen .* nowhere\.invalid: the name is not known"):
            await pccl.connect(master.address, listen="nowhere.invalid:0")


async def test_a_wrong_protocol_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newcomer is told both versions; the members go on."""
    async with pccl.Master() as master:
        one = await pccl.connect(master.address)
        monkeypatch.setattr(peer_module, "PROTOCOL_VERSION", 99)
        with pytest.raises(pccl.VersionMismatch, match=f"version {PROTOCOL_VERSION}, this peer 99") as caught:
            await pccl.connect(master.address, connect_timeout=20.0)
        assert "install the same pccl" in str(caught.value)
        monkeypatch.undo()
        await works([one])
        await one.close()


async def test_a_port_in_use() -> None:
    async with pccl.Master() as master:
        with pytest.raises(pccl.ConnectError) as caught:
            await pccl.Master(master.address).start()
        assert master.address in str(caught.value)
        assert "use" in str(caught.value)
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(pccl.ConnectError, match=f"127.0.0.1:{port}.*listen"):
                await pccl.connect(master.address, listen=f"127.0.0.1:{port}")
        async with pccl.connect(master.address, listen=f"127.0.0.1:{port}") as comm:
            await works([comm])


async def test_a_group_that_does_not_let_one_in() -> None:
    async with pccl.Master() as master:
        member = await pccl.connect(master.address)
        with pytest.raises(pccl.ConnectError, match=r"did not let it in within 0\.3 s.*update") as caught:
            await pccl.connect(master.address, connect_timeout=0.3)
        assert "'default'" in str(caught.value)
        await works([member])
        await member.update()
        assert member.world_size == 1
        await member.close()
        with pytest.raises(pccl.ConnectError, match="min_world_size"):
            await pccl.connect(master.address, connect_timeout=0.3, min_world_size=2, group="other")
