"""Training that loses and gains peers."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import pccl  # noqa: E402
from pccl import sync  # noqa: E402
from pccl.bindings.torch.elastic import Elastic  # noqa: E402
from tests.checks.support import QUICK, in_threads, master_thread  # noqa: E402

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}
ONE_AT_A_TIME = threading.Lock()


class Model(nn.Module):
    """With a buffer, and a parameter that only some use."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with ONE_AT_A_TIME:  # torch has one generator for all threads
            torch.manual_seed(seed)
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 2)
        self.rare = nn.Parameter(torch.ones(2))
        self.register_buffer("offset", torch.tensor([float(seed)]))

    def forward(self, x: Any, *, rare: bool = False) -> Any:
        y = self.two(torch.relu(self.one(x))) + self.offset
        return y * self.rare if rare else y


def data(step: int, member: int) -> Any:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1000 * step + member))


def bits(elastic: Elastic) -> dict[str, Any]:
    """All that has to be the same on all members."""
    return {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in elastic._state().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_training_of_one_with_all_data(optimizer: str) -> None:
    def body(comm: sync.Communicator) -> dict[str, Any]:
        model = Model(comm.rank)
        elastic = Elastic(comm, model, OPTIMIZERS[optimizer](model.parameters()), values={"position": 7 * comm.rank})
        while (step := elastic.begin()) < 8:
            model(data(step, comm.rank), rare=comm.rank == 0 and step > 3).square().mean().backward()
            assert elastic.should_commit()
            elastic.optimizer.step()
            elastic.values["position"] += 1
        elastic.close()
        return bits(elastic)

    found = in_threads(3, body)
    assert found[0] == found[1] == found[2]
    assert found[0]["value/position"] == 8
    model = Model(0)
    alone = OPTIMIZERS[optimizer](model.parameters())
    for step in range(8):
        alone.zero_grad()
        losses = [model(data(step, member), rare=member == 0 and step > 3).square().mean() for member in range(3)]
        (sum(losses) / 3).backward()
        alone.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(torch.tensor(found[0][f"parameter/{name}"]), p.detach())


def test_losses_and_newcomers() -> None:
    """One goes without a word when it has given a part of its gradients; another comes later, and has what the others have."""
    steps, dies_at, comes_at = 12, 4, 7
    comes = threading.Event()

    def member(address: str, name: str, world: int) -> tuple[dict[str, Any], int, list[int]]:
        worlds = []
        with sync.connect(address, name=name, **QUICK) as comm:
            while comm.world_size < world:
                comm.update()
            model = Model(len(name))
            elastic = Elastic(comm, model, torch.optim.AdamW(model.parameters()), values={"position": 0})
            first = -1
            while (step := elastic.begin()) < steps or comm.world_size < 3:
                first = step if first < 0 else first
                if step == comes_at:
                    comes.set()
                model(data(step, comm.rank)).square().mean().backward()
                if name == "dies" and step == dies_at:
                    comm.close()
                    return {}, first, worlds
                if elastic.should_commit():
                    worlds.append(comm.world_size)
                    elastic.optimizer.step()
                    elastic.values["position"] += comm.world_size
            elastic.close()
            return bits(elastic), first, worlds

    with master_thread() as address, ThreadPoolExecutor(4) as pool:
        early: list[Future[Any]] = [pool.submit(member, address, name, 3) for name in ("a", "bb", "dies")]
        assert comes.wait(30), [future.exception(1) for future in early]
        late = pool.submit(member, address, "late", 1)
        one, two, dead, last = (future.result(60) for future in (*early, late))
    assert dead[1] == 0
    assert one[0] == two[0]
    assert one[2][:dies_at] == [3] * dies_at
    assert one[2][dies_at:comes_at] == [2] * (comes_at - dies_at)
    assert last[1] > comes_at
    assert last[0] == one[0]


def test_a_step_that_is_given_up_ends_for_all() -> None:
    def body(comm: sync.Communicator) -> dict[str, Any]:
        model = Model(1)
        elastic = Elastic(comm, model, torch.optim.SGD(model.parameters(), lr=0.1))
        failed = 0
        while (step := elastic.begin()) < 3:
            model(data(step, comm.rank)).sum().backward()
            if step == 1 and comm.rank == 0 and not failed:
                failed += 1
                continue
            if not elastic.should_commit():
                failed += 1
                continue
            elastic.optimizer.step()
        assert failed == 1
        return bits(elastic)

    found = in_threads(2, body)
    assert found[0] == found[1]


def test_several_backward_passes() -> None:
    def body(comm: sync.Communicator) -> list[float]:
        model = nn.Linear(2, 1, bias=False)
        elastic = Elastic(comm, model, torch.optim.SGD(model.parameters(), lr=1.0))
        elastic.begin()
        with elastic.no_sync():
            model(torch.tensor([[1.0, 0.0]]) * (comm.rank + 1)).sum().backward()
        model(torch.tensor([[0.0, 1.0]])).sum().backward()
        assert elastic.should_commit()
        grad: Any = model.weight.grad
        found = list(grad.flatten().tolist())
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(pccl.InvalidArgument, match="no_sync"):
            model(torch.ones(1, 2)).sum().backward()
        return found

    assert in_threads(2, body) == [[1.5, 1.0]] * 2


def test_what_cannot_be_trained() -> None:
    def body(comm: sync.Communicator) -> None:
        model = nn.Linear(2, 2)
        with pytest.raises(pccl.InvalidArgument, match="1 of its parameters"):
            Elastic(comm, model, torch.optim.SGD([*model.parameters(), torch.zeros(1, requires_grad=True)]))
        with pytest.raises(pccl.InvalidArgument, match="no parameter"):
            Elastic(comm, model.requires_grad_(False), torch.optim.SGD(model.parameters()))

    in_threads(1, body)
