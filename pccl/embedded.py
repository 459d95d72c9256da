"""A master for programs without an event loop: in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future, InvalidStateError
from types import TracebackType
from typing import Any

from pccl.master import Master


class MasterThread:
    """Serves until `close`; a context manager.

    Args:
        settings: as for `pccl.Master`.

    Raises:
        ConnectError, InvalidArgument: see `pccl.Master`.
    """

    def __init__(self, **settings: Any) -> None:
        self._end: Future[float] = Future()
        ready: Future[str] = Future()
        self._thread = threading.Thread(target=self._live, args=(ready, settings), name="pccl-master", daemon=True)
        self._thread.start()
        self.address = ready.result()
        """What peers give to `connect`"""

    def _live(self, ready: Future[str], settings: dict[str, Any]) -> None:
        async def serve() -> None:
            async with Master(**settings) as master:
                ready.set_result(master.address)
                patience = await asyncio.wrap_future(self._end)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        await master.idle()

        try:
            asyncio.run(serve())
        except BaseException as e:
            if ready.done():
                raise
            ready.set_exception(e)

    def close(self, patience: float = 0.0) -> None:
        """Stop serving, once no peer is connected any more or so many seconds are over."""
        with contextlib.suppress(InvalidStateError):  # it was said before
            self._end.set_result(patience)
        self._thread.join()

    def __enter__(self) -> MasterThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
