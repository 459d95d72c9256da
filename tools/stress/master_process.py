"""The master of the stress run, in a process of its own: ``python -m pccl.tools.stress.master_process``, started by the driver.

It says where it listens, and then what it holds, once a second.
"""

from __future__ import annotations

import argparse
import asyncio

import pccl
from pccl.tools.stress.inside import begin, explain_on_signal, usage


async def serve(listen: str, *, recover: bool) -> None:
    """Serve until the driver's first word."""
    loop, finished = asyncio.get_running_loop(), asyncio.Event()
    driver = begin(lambda: loop.call_soon_threadsafe(finished.set))
    async with pccl.Master(listen, recover=recover) as master:
        explain_on_signal(lambda: master)
        driver.tell("serving", address=master.address)
        while not finished.is_set():
            driver.tell("usage", usage=usage(None))
            try:
                async with asyncio.timeout(1.0):
                    await finished.wait()
            except TimeoutError:
                pass


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="pccl.tools.stress.master_process")
    parser.add_argument("listen")
    parser.add_argument("--recover", action="store_true")
    options = parser.parse_args()
    asyncio.run(serve(options.listen, recover=options.recover))
