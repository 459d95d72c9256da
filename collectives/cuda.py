"""GPUs, as calls see them: a mark in the caller's stream, copies on streams of our own, and host memory that is pinned for them.

All that asks torch for CUDA is here. Nothing of it imports torch: whoever has a tensor has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pccl.core.errors import InvalidArgument

Bytes = npt.NDArray[np.uint8]

PORTABLE = 1
"""cudaHostRegisterPortable: for all devices."""


class Event(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """Whether everything before it is done; raises what has gone wrong on the device."""

    def synchronize(self) -> None:
        """Wait until it is."""


class Mark(NamedTuple):
    """Where a caller's stream was when it made a call."""

    event: Event
    stream: Any


class Piece(NamedTuple):
    """Elements of some tensors, in the order of their indices."""

    start: int
    stop: int
    views: tuple[Any, ...]
    """Tensors with just these"""


class Gpu:
    """One device: copies in each direction go on a stream, so that they overlap with each other and with what callers compute."""

    def __init__(self, device: Any) -> None:
        cuda = _torch().cuda
        self.device = device
        self._fetching = cuda.Stream(device)
        self._storing = cuda.Stream(device)

    def mark(self) -> Mark:
        """What the calling thread's current stream has been given so far.

        Raises:
            InvalidArgument: it is being captured into a graph.
        """
        cuda = _torch().cuda
        with cuda.device(self.device):
            if cuda.is_current_stream_capturing():
                raise InvalidArgument(f"the current stream of {self.device} is being captured: a call cannot be part of a CUDA graph")
            stream = cuda.current_stream()
            return Mark(stream.record_event(), stream)

    def fetch(self, views: Iterable[Any], host: Bytes) -> Event:
        """Begin to copy tensors to host memory, one after the other; the event tells when that is done."""
        torch = _torch()
        with torch.inference_mode(), torch.cuda.stream(self._fetching):
            for view, here in _beside(views, host):
                here.copy_(view, non_blocking=True)
            return self._event(self._fetching)

    def store(self, host: Bytes, views: Iterable[Any]) -> Event:
        """Begin to copy host memory to tensors, one after the other; the event tells when that is done."""
        torch = _torch()
        with torch.inference_mode(), torch.cuda.stream(self._storing):
            for view, here in _beside(views, host):
                view.copy_(here, non_blocking=True)
            return self._event(self._storing)

    def _event(self, stream: Any) -> Event:
        event: Event = stream.record_event(_torch().cuda.Event(blocking=True))
        return event

    def empty(self, shape: Any, dtype: Any) -> Any:
        """A new tensor that `store` may write to at once; `lend` it to the stream of whoever gets it."""
        torch = _torch()
        with torch.cuda.stream(self._storing):  # whose memory is free for this stream, and not yet for another
            return torch.empty(shape, dtype=dtype, device=self.device)

    def lend(self, tensor: Any, mark: Mark) -> None:
        """A tensor that was made here is used on a caller's stream: its memory is free again when that has done what it was given."""
        tensor.record_stream(mark.stream)

    def pin(self, host: Bytes) -> None:
        """Have host memory, of whole pages, stay where it is: copies to and from it are done by the device."""
        torch = _torch()
        with torch.cuda.device(self.device):
            error = int(torch.cuda.cudart().cudaHostRegister(host.ctypes.data, host.nbytes, PORTABLE))
        if error:
            raise RuntimeError(f"{host.nbytes} bytes of host memory cannot be pinned: cudaHostRegister failed with error {error}")

    def unpin(self, host: Bytes) -> None:
        """It is host memory like any other again; no copy may be under way."""
        torch = _torch()
        with torch.cuda.device(self.device):
            torch.cuda.cudart().cudaHostUnregister(host.ctypes.data)


@cache
def gpu_of(device: Any) -> Gpu:
    """The device of a CUDA tensor.

    Raises:
        InvalidArgument: this torch cannot use CUDA here.
    """
    torch = _torch()
    if not torch.cuda.is_available():
        built = "finds no GPU" if torch.backends.cuda.is_built() else "was built without CUDA"
        raise InvalidArgument(f"a tensor on {device} is given, but torch {torch.__version__} {built}; give a CPU tensor")
    return Gpu(device)


def pieces(tensors: Sequence[Any], most: int, count: int) -> list[Piece]:
    """The first `count` elements of some tensors, cut, or small ones put together, into pieces of up to `most` elements."""
    found: list[Piece] = []
    views: list[Any] = []
    start = stop = 0
    for view in [view for tensor in tensors for view in _cut(tensor.detach(), most)]:
        for part in _first(view, count - stop):
            if views and stop + part.numel() - start > most:
                found.append(Piece(start, stop, tuple(views)))
                start, views = stop, []
            views.append(part)
            stop += part.numel()
    if stop > start:
        found.append(Piece(start, stop, tuple(views)))
    return found


def _cut(tensor: Any, most: int) -> Iterator[Any]:
    """Views of up to `most` elements, contiguous if the tensor is."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(most)
    elif tensor.numel() <= most:
        yield tensor
    else:
        rows = most * len(tensor) // tensor.numel()
        for part in tensor.split(rows) if rows else tensor.unbind():
            yield from _cut(part, most)


def _first(tensor: Any, count: int) -> Iterator[Any]:
    """Views of its first elements."""
    if count >= tensor.numel():
        yield tensor
    elif tensor.is_contiguous():
        yield tensor.view(-1)[:count]
    else:
        rows, rest = divmod(count, tensor.numel() // len(tensor))
        yield tensor[:rows]
        yield from _first(tensor[rows], rest)


def _beside(views: Iterable[Any], host: Bytes) -> Iterator[tuple[Any, Any]]:
    """Each tensor that has elements, with the part of host memory that belongs to it, as a tensor of the same kind."""
    torch = _torch()
    start = 0
    for view in views:
        stop = start + view.numel() * view.element_size()
        if start < stop:
            yield view, torch.from_numpy(host[start:stop]).view(view.dtype).view(view.shape)
        start = stop


def _torch() -> Any:
    return sys.modules["torch"]
