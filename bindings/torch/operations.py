"""What each method of a process group means in calls of a `pccl.sync.Communicator`.

Method names and arguments are those that torch 2.13 uses; the older ones, which it still looks for in places, are in `ALIASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from pccl import sync
from pccl.core.dtypes import ReduceOp, premul_sum
from pccl.core.errors import InvalidArgument

_OPS = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "avg",
    dist.ReduceOp.PRODUCT: "prod",
    dist.ReduceOp.MIN: "min",
    dist.ReduceOp.MAX: "max",
    dist.ReduceOp.BAND: "band",
    dist.ReduceOp.BOR: "bor",
    dist.ReduceOp.BXOR: "bxor",
}

_ALL_TO_ALL = "all_to_all"
"""Tag of its sends; torch's own are numbers"""


class Call(NamedTuple):
    """One call of a communicator."""

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


class Plan(NamedTuple):
    """What a method does."""

    calls: Sequence[Call]
    result: list[Tensor]
    """The tensors that have the result, for the call's future"""


def reduction(op: Any) -> str | ReduceOp:
    """torch's operator, or options that have one.

    Raises:
        InvalidArgument: there is no such operator here.
    """
    op = getattr(op, "reduceOp", op)
    kind = getattr(op, "op", op)  # of a wrapper, which compares but does not hash like what it wraps
    if kind == dist.ReduceOp.PREMUL_SUM:
        return premul_sum(float(op.factor))
    if kind not in _OPS:
        raise InvalidArgument(f"op: {kind} is not supported; use one of {', '.join(str(known) for known in _OPS)} or PREMUL_SUM")
    return _OPS[kind]


def _fused(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors


def _rows(name: str, x: Tensor, splits: list[int], world: int) -> list[Tensor]:
    """Rows for each rank: so many, or as many for each."""
    if not splits:
        if x.shape[0] % world:
            raise InvalidArgument(f"{name}: {x.shape[0]} rows are not a multiple of the group's size, {world}; give split sizes")
        splits = [x.shape[0] // world] * world
    if len(splits) != world or sum(splits) != x.shape[0]:
        raise InvalidArgument(f"{name} splits: {world} numbers are needed that add up to the {x.shape[0]} rows, not {splits}")
    return list(torch.split(x, splits))


def _all_reduce(comm: sync.Communicator, tensors: list[Tensor], opts: Any) -> Plan:
    if len(tensors) == 1 and tensors[0].is_sparse:
        return _all_reduce_sparse(comm, tensors[0], opts)
    return Plan([Call("all_reduce", (_fused(tensors),), {"op": reduction(opts)})], tensors)


def _all_reduce_sparse(comm: sync.Communicator, x: Tensor, opts: Any) -> Plan:
    """The sum of sparse tensors, complete when this returns. Everyone gets everyone's elements, filled up to the largest number of them."""
    if reduction(opts) != "sum":
        raise InvalidArgument(f"op: sparse tensors can only be summed, not {reduction(opts)}")
    given = x.coalesce()
    count, world = given.values().shape[0], comm.world_size
    counts = torch.zeros(world, dtype=torch.int64)
    comm.all_gather(torch.tensor([count]), out=counts, atomic=False)
    found = []
    for part in (given.indices().t(), given.values()):
        filled = part.new_zeros((int(counts.max()), *part.shape[1:]))
        filled[:count] = part
        everyone = part.new_empty((world, *filled.shape))
        comm.all_gather(filled, out=everyone, atomic=False)
        found.append(torch.cat([everyone[r, : int(n)] for r, n in enumerate(counts)]))
    x.copy_(torch.sparse_coo_tensor(found[0].t(), found[1], x.shape).coalesce())
    return Plan([], [x])


def _broadcast(comm: sync.Communicator, tensors: list[Tensor], opts: Any) -> Plan:
    return Plan([Call("broadcast", (_fused(tensors),), {"root": opts.rootRank})], tensors)


def _reduce(comm: sync.Communicator, tensors: list[Tensor], opts: Any) -> Plan:
    return Plan([Call("reduce", (_fused(tensors),), {"root": opts.rootRank, "op": reduction(opts)})], tensors)


def _all_gather(comm: sync.Communicator, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> Plan:
    """One tensor from each rank for each given one."""
    calls = [Call("all_gather", (x,), {"out": out}) for out, x in zip(outs, tensors, strict=True)]
    return Plan(calls, [x for out in outs for x in out])


def _all_gather_coalesced(comm: sync.Communicator, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> Plan:
    """A list of tensors from each rank: the lists of outs are by rank."""
    by_tensor = [list(outs_of_one) for outs_of_one in zip(*outs, strict=True)]
    return _all_gather(comm, by_tensor, tensors, opts)


def _all_gather_single(comm: sync.Communicator, out: Tensor, x: Tensor, opts: Any) -> Plan:
    return _all_gather_singles(comm, [out], [x], opts)


def _all_gather_singles(comm: sync.Communicator, outs: list[Tensor], tensors: list[Tensor], opts: Any) -> Plan:
    return Plan([Call("all_gather", (x,), {"out": out}) for out, x in zip(outs, tensors, strict=True)], outs)


def _gather(comm: sync.Communicator, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any) -> Plan:
    root = {"root": opts.rootRank}
    if comm.rank == opts.rootRank:
        return Plan([Call("gather", (tensors[0],), {"out": outs[0], **root})], outs[0])
    return Plan([Call("gather", (tensors[0],), root)], tensors)


def _scatter(comm: sync.Communicator, outs: list[Tensor], tensors: list[list[Tensor]], opts: Any) -> Plan:
    given = tensors[0] if comm.rank == opts.rootRank and tensors else None
    return Plan([Call("scatter", (outs[0], given), {"root": opts.rootRank})], outs)


def _reduce_scatter(comm: sync.Communicator, outs: list[Tensor], tensors: list[list[Tensor]], opts: Any) -> Plan:
    op = reduction(opts)
    return Plan([Call("reduce_scatter", (given,), {"op": op, "out": out}) for out, given in zip(outs, tensors, strict=True)], outs)


def _reduce_scatter_single(comm: sync.Communicator, out: Tensor, x: Tensor, opts: Any) -> Plan:
    return _reduce_scatter_singles(comm, [out], [x], opts)


def _reduce_scatter_singles(comm: sync.Communicator, outs: list[Tensor], tensors: list[Tensor], opts: Any) -> Plan:
    op = reduction(opts)
    return Plan([Call("reduce_scatter", (x,), {"op": op, "out": out}) for out, x in zip(outs, tensors, strict=True)], outs)


def _all_to_all(comm: sync.Communicator, outs: list[Tensor], tensors: list[Tensor], opts: Any) -> Plan:
    """Between every two ranks their own number of elements: each sends to each, but to itself."""
    mine = comm.rank
    sends = [Call("send", (x,), {"dst": r, "tag": _ALL_TO_ALL}) for r, x in enumerate(tensors) if r != mine and x.numel()]
    recvs = [Call("recv", (x,), {"src": r, "tag": _ALL_TO_ALL}) for r, x in enumerate(outs) if r != mine and x.numel()]
    outs[mine].copy_(tensors[mine].view_as(outs[mine]))
    return Plan(sends + recvs, outs)


def _all_to_all_single(comm: sync.Communicator, out: Tensor, x: Tensor, out_splits: list[int], in_splits: list[int], opts: Any) -> Plan:
    if not out_splits and not in_splits:
        return Plan([Call("all_to_all", (x,), {"out": out})], [out])
    outs, given = _rows("output", out, out_splits, comm.world_size), _rows("input", x, in_splits, comm.world_size)
    return _all_to_all(comm, outs, given, opts)._replace(result=[out])


def _barrier(comm: sync.Communicator, opts: Any) -> Plan:
    return Plan([Call("barrier", ())], [torch.empty(0)])


def _send(comm: sync.Communicator, tensors: list[Tensor], dst: int, tag: int) -> Plan:
    return Plan([Call("send", (_fused(tensors),), {"dst": dst, "tag": tag})], tensors)


def _recv(comm: sync.Communicator, tensors: list[Tensor], src: int, tag: int) -> Plan:
    return Plan([Call("recv", (_fused(tensors),), {"src": src, "tag": tag})], tensors)


class Operation(NamedTuple):
    """A method of a process group."""

    plan: Callable[..., Plan]
    """Called with the communicator, the method's own arguments and the options, if it has some"""
    options: Callable[[], Any] | None = None
    """Makes those of a caller who gives none"""


OPERATIONS = {
    "allreduce": Operation(_all_reduce, c10d.AllreduceOptions),
    "allreduce_coalesced": Operation(_all_reduce, c10d.AllreduceCoalescedOptions),
    "broadcast": Operation(_broadcast, c10d.BroadcastOptions),
    "reduce": Operation(_reduce, c10d.ReduceOptions),
    "allgather": Operation(_all_gather, c10d.AllgatherOptions),
    "allgather_coalesced": Operation(_all_gather_coalesced, c10d.AllgatherOptions),
    "all_gather_single": Operation(_all_gather_single, c10d.AllgatherOptions),
    "all_gather_single_coalesced": Operation(_all_gather_singles, c10d.AllgatherOptions),
    "gather": Operation(_gather, c10d.GatherOptions),
    "scatter": Operation(_scatter, c10d.ScatterOptions),
    "reduce_scatter": Operation(_reduce_scatter, c10d.ReduceScatterOptions),
    "reduce_scatter_single": Operation(_reduce_scatter_single, c10d.ReduceScatterOptions),
    "reduce_scatter_single_coalesced": Operation(_reduce_scatter_singles, c10d.ReduceScatterOptions),
    "alltoall": Operation(_all_to_all, c10d.AllToAllOptions),
    "all_to_all_single": Operation(_all_to_all_single, c10d.AllToAllOptions),
    "barrier": Operation(_barrier, c10d.BarrierOptions),
    "send": Operation(_send),
    "recv": Operation(_recv),
}

ALIASES = {
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "alltoall_base": "all_to_all_single",
}
"""Names before torch 2.13"""
