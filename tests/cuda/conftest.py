"""What the tests of this folder run on: a GPU, if there is one, and in any case something that behaves like a slow one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pccl.collectives import cuda
from pccl.staging import Pinned


class Fake:
    """Without a GPU."""

    name = "fake"

    def __init__(self) -> None:
        from tests.cuda.fake import FakeCuda

        self.torch = FakeCuda()

    def put(self, x: Any) -> Any:
        """A tensor on the device with this content, which shares no memory with it."""
        from tests.cuda.fake import FakeTensor

        return x.clone(memory_format=__import__("torch").preserve_format).as_subclass(FakeTensor)

    def later(self, work: Callable[[], Any]) -> None:
        """Give work to the current stream, which takes a while."""
        self.torch.caller.held = True
        self.torch.caller.give("work", work)

    def go_on(self) -> None:
        """That while is over."""
        self.torch.caller.held = False

    def get(self, x: Any) -> Any:
        """The content of a tensor, as the current stream sees it."""
        self.torch.caller.record_event().synchronize()
        return x.as_subclass(__import__("torch").Tensor).detach().clone()


class Real:
    """With one."""

    name = "cuda"

    def put(self, x: Any) -> Any:
        return x.detach().to("cuda", copy=True).as_subclass(type(x)).requires_grad_(x.requires_grad)

    def later(self, work: Callable[[], Any]) -> None:
        torch: Any = __import__("torch")
        torch.cuda._sleep(200_000_000)  # cycles
        work()

    def go_on(self) -> None:
        pass

    def get(self, x: Any) -> Any:
        return x.detach().cpu()


@pytest.fixture(scope="session", autouse=True)
def _driver() -> None:
    """What a process opens for its GPU and never closes is there before anybody counts."""
    torch: Any = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        gpu, pinned = cuda.gpu_of(torch.zeros(1, device="cuda").device), Pinned(1 << 20)
        pinned.pin(gpu)
        tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
        gpu.fetch([tensor], pinned.bytes).synchronize()
        gpu.store(pinned.bytes, [tensor]).synchronize()
        pinned.unpin()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("torch")
    made = Fake()
    monkeypatch.setattr(cuda, "_torch", lambda: made.torch)
    cuda.gpu_of.cache_clear()
    yield made
    cuda.gpu_of.cache_clear()
    assert not made.torch.pinned, "some memory is still pinned"


@pytest.fixture(params=["fake", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Any:
    torch = pytest.importorskip("torch")
    if request.param == "fake":
        return request.getfixturevalue("fake")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.zeros(1, device="cuda")
    return Real()


def bits(x: Any) -> bytes:
    """Of a tensor on the host."""
    import torch

    found: bytes = np.ascontiguousarray(x.detach().contiguous().view(-1).view(torch.uint8).numpy()).tobytes() if x.numel() else b""
    return found
