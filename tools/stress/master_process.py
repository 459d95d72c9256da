"""The master of the stress run, in a process of its own: ``python -m pccl.tools.stress.master_process``, started by the driver.

It says where it listens, and then what it holds, once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import signal
import sys
import time
from typing import Any

import pccl
from pccl.tools.stress.leash import on_leash
from pccl.tools.stress.usage import describe_master, usage


async def serve(options: argparse.Namespace) -> None:
    """Serve until the driver's first word."""
    loop, finished = asyncio.get_running_loop(), asyncio.Event()
    on_leash(lambda: loop.call_soon_threadsafe(finished.set))
    timeouts = pccl.Options(heartbeat_timeout=options.heartbeat_timeout)
    async with pccl.Master(options.listen, recover=options.recover, options=timeouts) as master:
        loop.add_signal_handler(signal.SIGUSR1, lambda: print(describe_master(master), file=sys.stderr, flush=True))
        _tell("serving", address=master.address)
        while not finished.is_set():
            _tell("usage", usage=usage(None))
            try:
                async with asyncio.timeout(1.0):
                    await finished.wait()
            except TimeoutError:
                pass
    _tell("finished", usage=usage(None))


def _tell(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, "at": time.monotonic(), "connection": 0, **facts}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Live as long as the driver wants."""
    parser = argparse.ArgumentParser(prog="pccl.tools.stress.master_process")
    parser.add_argument("listen")
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--heartbeat-timeout", type=float, required=True)
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
