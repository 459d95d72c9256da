"""A program for a torch job: ``python -m tests.bindings.job WHAT BACKEND [NAME=VALUE...]``, the last for `init_process_group`."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 50


def check() -> None:
    """What users call first, each once."""
    rank, size = dist.get_rank(), dist.get_world_size()
    total = sum(range(1, size + 1))
    x = torch.full((3,), rank + 1.0)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    assert x.tolist() == [total] * 3
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert x.tolist() == [total] * 3
    z = torch.full((2,), complex(rank + 1, 1))
    dist.all_reduce(z)
    assert z.tolist() == [complex(total, size)] * 2
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    said = [{"from": "0"} if rank == 0 else None]
    dist.broadcast_object_list(said, src=0)
    assert said == [{"from": "0"}]
    outs = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(outs, torch.full((2,), float(rank)))
    assert [int(out[0]) for out in outs] == list(range(size))
    right, left = (rank + 1) % size, (rank - 1) % size
    got = torch.zeros(1)
    for request in dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.tensor([float(rank)]), right), dist.P2POp(dist.irecv, got, left)]):
        request.wait()
    assert got.item() == left
    pair = dist.new_group([0, 1])
    if rank < 2:
        y = torch.ones(1)
        dist.all_reduce(y, group=pair)
        assert y.item() == 2
    dist.barrier()


class Model(nn.Module):
    """A small transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layer(self.embedding(x)))
        return found


def train(how: str) -> list[float]:
    """Losses of some steps, the same on every rank."""
    torch.manual_seed(1)
    model: Any = Model()
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.Generator().manual_seed(100 + dist.get_rank())
    losses = []
    for _ in range(STEPS):
        x = torch.randint(0, 32, (8, 12), generator=data).sort(dim=1).values
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=dist.ReduceOp.SUM)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def hooks() -> None:
    """Communication hooks of torch, and a checkpoint that is written meanwhile."""
    import tempfile

    from torch.distributed import checkpoint
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    for state, hook in (
        (None, fp16_compress_hook),
        (PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook),
    ):
        model = DistributedDataParallel(nn.Linear(8, 8))
        model.register_comm_hook(state, hook)
        for _ in range(4):
            model(torch.ones(2, 8) * (dist.get_rank() + 1)).sum().backward()
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(where, src=0)
    saved = {"weight": torch.ones(3)}
    checkpoint.async_save(saved, checkpoint_id=where[0]).result()
    saved["weight"].zero_()
    checkpoint.load(saved, checkpoint_id=where[0])
    assert saved["weight"].tolist() == [1, 1, 1]


def lose_one() -> None:
    """The last rank dies within a step; the others' step fails, and the next one is theirs."""
    torch.manual_seed(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(nn.Linear(4, 4))
    failures: list[str] = []
    for step in range(6):
        if rank == size - 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        model.zero_grad()
        loss = model(torch.ones(2, 4) * (dist.get_rank() + 1)).sum()
        try:
            loss.backward()
        except RuntimeError as e:
            failures.append(str(e))
    assert len(failures) == 1
    assert "CollectiveAborted" in failures[0]
    group: Any = dist.group.WORLD
    assert len(group.last_error.lost) == 1
    assert dist.get_world_size() == size - 1
    weight: Any = model.module.weight.grad
    ranks = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(ranks)
    torch.testing.assert_close(weight, torch.full((4, 4), 2 * ranks.item() / (size - 1)))


def main() -> None:
    """Run one of them, and say on one line that it has succeeded."""
    what, backend, *arguments = sys.argv[1:]
    given: dict[str, Any] = dict(argument.split("=", 1) for argument in arguments)
    dist.init_process_group(backend, **{name: int(value) if value.isdigit() else value for name, value in given.items()})
    if what == "check":
        check()
        found: Any = "ok"
    elif what in ("lose_one", "hooks"):
        {"lose_one": lose_one, "hooks": hooks}[what]()
        found = "ok"
    else:
        found = train(what)
    dist.destroy_process_group()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
