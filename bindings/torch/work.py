"""What a call of torch.distributed returns: a `torch.distributed.Work`, and the future behind it."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pccl.core.errors import CollectiveTimeout

FOREVER = timedelta(0)
"""What torch's C++ gives for a wait without a limit"""

_telling: set[threading.Thread] = set()


def outlast_callbacks(seconds: float) -> None:
    """Wait until the callbacks of all futures have run: a thread that is in torch when the interpreter ends would abort the process."""
    deadline = time.monotonic() + seconds
    for thread in list(_telling):
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


class Work(dist.Work):
    """One call, until `finish`.

    Who has asked for its future gets that from a thread of its own: callbacks may wait for other calls, as those of PowerSGD do, and the
    engine's thread must not.

    The future is opened through a gate: a `torch.futures.Future` that is given an exception itself ends the process when DDP reads it, one
    whose callback raises does not.

    Args:
        value: the tensors that have the result; never None, since DDP's C++ reads them.
    """

    def __init__(self, value: list[torch.Tensor]) -> None:
        super().__init__()
        self._value = value
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._gate: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None

    def finish(self, error: BaseException | None = None) -> None:
        """The call has ended."""
        with self._lock:
            self._error = error
            gate = self._gate
            if gate is None:
                self._over.set()
                return
        thread = threading.Thread(target=self._tell, args=(gate,), name="pccl-future", daemon=True)
        _telling.add(thread)
        thread.start()

    def _tell(self, gate: torch.futures.Future[Any]) -> None:
        """Who waits for the future goes on before who waits for this."""
        try:
            gate.set_result(None)
        finally:
            self._over.set()
            _telling.discard(threading.current_thread())

    def wait(self, timeout: timedelta = FOREVER) -> bool:
        """Wait for the call's end; True, or its error is raised. A wait that takes too long leaves the call as it is."""
        if not self._over.wait(timeout.total_seconds() if timeout > FOREVER else None):
            raise CollectiveTimeout(f"the call has not ended after {timeout.total_seconds():g} s; it goes on")
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """The call's result as a list of tensors."""
        with self._lock:
            if self._future is None:
                self._gate = torch.futures.Future()
                self._future = self._gate.then(self._open)
                if self._over.is_set():
                    self._gate.set_result(None)
            return self._future

    def _open(self, _: torch.futures.Future[Any]) -> list[torch.Tensor]:
        if self._error is not None:
            raise self._error
        return self._value

    def is_completed(self) -> bool:
        """Whether the call has ended."""
        return self._over.is_set()

    def is_success(self) -> bool:
        """Whether it has, and well."""
        return self._over.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        """Its error, if it has one."""
        return self._error

    def synchronize(self) -> None:
        """See `wait`."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that have the result.

        Raises:
            RuntimeError: the call has not ended.
        """
        if not self._over.is_set():
            raise RuntimeError("the call has not ended")
        return self._value
