"""A GPU for machines without one: what the library asks of torch.cuda, on memory that is told from the host's by wrong addresses.

It is as late as a device can be: what is given to a stream is done when somebody waits for it, and not before. Work on the caller's
stream is done when the test says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

AWAY = 1 << 60
"""Where this memory is not: whoever reads a fake tensor's address instead of copying it crashes."""


class FakeTensor(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda", getattr(self, "ordinal", 0)))  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return super().data_ptr() + AWAY

    def record_stream(self, stream: Any) -> None:
        stream.lent.append(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            into, source = (arg.as_subclass(torch.Tensor) for arg in args)
            _now.stream.give("store" if isinstance(args[0], FakeTensor) else "fetch", lambda: into.copy_(source))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Now(threading.local):
    """The current stream of a thread."""

    stream: Stream


_now = Now()


class Stream:
    """Work in order."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu
        self.lent: list[Any] = []
        self.held = False
        """Nothing is done before the test says so."""
        self._work: list[tuple[str, Callable[[], Any], bool]] = []
        self._done = 0
        self._lock = threading.RLock()

    def give(self, what: str, work: Callable[[], Any]) -> None:
        if self.gpu.broken == what:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._work.append((what, work, torch.is_inference_mode_enabled()))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.stream, event.place = self, len(self._work)
        return event

    def reached(self, place: int) -> bool:
        return self._done >= place or not self.held

    def run(self, place: int) -> None:
        """Do what was given up to there."""
        with self._lock:
            while self._done < place:
                what, work, inference = self._work[self._done]
                self.gpu.gate(what)
                with torch.inference_mode(inference):
                    work()
                self._done += 1
                self.gpu.log.append(what)


class Event:
    def __init__(self, **how: Any) -> None:
        self.stream: Stream
        self.place = 0

    def query(self) -> bool:
        if not self.stream.reached(self.place):
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        assert self.stream.reached(self.place), "this wait would have no end"
        if self.stream.gpu.broken == "wait":
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.stream.run(self.place)


class FakeCuda:
    """torch, as `pccl.collectives.cuda` knows it."""

    def __init__(self) -> None:
        self.caller = Stream(self)
        """The current stream of all callers"""
        self.capturing = False
        self.broken = ""
        """What fails: fetch, store, wait or pin"""
        self.gate: Callable[[str], None] = lambda what: None
        """Called before anything is done"""
        self.log: list[str] = []
        """What was done"""
        self.pinned: dict[int, int] = {}
        self.inference_mode = torch.inference_mode
        self.from_numpy = torch.from_numpy
        self.__version__ = torch.__version__
        self.cuda = SimpleNamespace(
            is_available=lambda: True,
            Stream=lambda device: Stream(self),
            Event=Event,
            stream=self._stream,
            device=self._device,
            current_stream=lambda: self.caller,
            is_current_stream_capturing=lambda: self.capturing,
            cudart=lambda: SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self._unregister),
        )

    def empty(self, shape: Any, *, dtype: Any, device: Any) -> Any:
        return torch.empty(shape, dtype=dtype).as_subclass(FakeTensor)

    @contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(_now, "stream", self.caller)
        _now.stream = stream
        yield
        _now.stream = before

    @contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        yield

    def _register(self, address: int, nbytes: int, flags: int) -> int:
        if self.broken == "pin":
            return 2
        assert address not in self.pinned, "pinned already"
        self.pinned[address] = nbytes
        return 0

    def _unregister(self, address: int) -> int:
        del self.pinned[address]
        return 0
