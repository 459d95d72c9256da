"""A peer in a process of its own: `python -m tests.support.control_child ADDRESS`.

Does what the master's messages say, and ends with its standard input.
"""

import asyncio
import ctypes
import gc
import os
import signal
import sys

from pccl.core.address import parse_address
from pccl.transports.zmq import ZmqClient
from tests.support.control import descriptors


class Peer:
    def __init__(self, client: ZmqClient) -> None:
        self.client = client

    def control_up(self) -> None:
        self.client.send(b"hello")

    def control_received(self, data: bytes) -> None:
        order, _, argument = data.decode().partition(" ")
        getattr(self, order)(argument)

    def control_down(self) -> None: ...

    def control_refused(self, error: Exception) -> None:
        sys.exit(str(error))

    def echo(self, argument: str) -> None:
        self.client.send(argument.encode())

    def ignore(self, argument: str) -> None: ...

    def hold(self, argument: str) -> None:
        """Hold the interpreter for some seconds: as PyDLL, the call keeps the GIL."""
        self.client.send(b"holding")
        ctypes.PyDLL(None).usleep(int(float(argument) * 1e6))
        self.client.send(b"released")

    def fork(self, argument: str) -> None:
        """Fork a child that only waits for the end of its standard input, and then says how many sockets it has."""
        child = os.fork()
        if child == 0:
            sys.stdin.buffer.read()
            os._exit(0)
        self.client.send(b"%d" % child)

    def fork_and_exit(self, argument: str) -> None:
        """Fork a child that ends as Python does, with all finalizers; report how it ended."""
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # a hang ends it, and is reported
            del self.client
            gc.collect()
            sys.exit(7)
        _, status = os.waitpid(child, 0)
        self.client.send(b"%d" % os.waitstatus_to_exitcode(status))

    def fork_and_look(self, argument: str) -> None:
        """Report the descriptors of this process and of a child of it, those that are open on something but /dev/null."""
        mine = descriptors()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, repr(descriptors()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with open(read, "rb") as file:
            self.client.send(repr(mine).encode() + b"|" + file.read())


async def main(address: str) -> None:
    client = ZmqClient(parse_address(address))
    await client.start(Peer(client))
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(0, lambda: None if os.read(0, 100) else ended.set())
    await ended.wait()
    loop.remove_reader(0)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
