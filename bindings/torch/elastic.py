"""Data-parallel training that loses and gains peers: a few lines around an ordinary loop.

    with pccl.sync.connect(address, min_world_size=2) as comm:
        elastic = Elastic(comm, model, optimizer, values={"position": 0})
        while elastic.begin() < steps:
            loss(model(batch())).backward()
            if elastic.should_commit():
                optimizer.step()

Every step is a round: all gradients are averaged over the same members, on all of them, or the step did not happen on any. If a peer is
lost within it, the survivors average theirs. So model and optimizer stay the same to the bit on all members, and newcomers get them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from pccl import sync
from pccl.core.errors import CollectiveAborted, InvalidArgument, TooFewPeers

BUCKET_BYTES = 25 << 20
FIRST_BUCKET_BYTES = 1 << 20
"""Of gradients, which are sent together; the first is smaller, since until it is there nothing is sent (as in DDP)"""


class _Bucket:
    """Gradients that are sent together, in one tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        pieces = torch.split(self.flat, [p.numel() for p in parameters])
        self.places = [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]
        self.missing = len(parameters)


class Elastic:
    """A model and its optimizer, trained by the members of a group.

    `begin`, the backward passes and `should_commit` are called by all members, in turn. Each gives gradients of its own data; they are
    averaged in buckets while the backward pass runs.

    Args:
        comm: as `pccl.sync.connect` gives it.
        model: the same on all members in its shapes; newcomers get parameters and buffers of the others.
        optimizer: of this model. Its state and its settings are shared, too.
        values: numbers, text or bytes that all members have alike, such as the place in the data; change them in place, between
            `should_commit` and `begin`, and alike on all members.

    Raises:
        InvalidArgument: the optimizer has parameters that the model has not, or none is to be trained.
    """

    def __init__(
        self,
        comm: sync.Communicator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        values: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.values = {} if values is None else values
        self.step = 0
        """Steps that were committed"""
        self._names = {p: name for name, p in model.named_parameters()}
        strange = [p for group in optimizer.param_groups for p in group["params"] if p not in self._names]
        if strange:
            raise InvalidArgument(f"optimizer: {len(strange)} of its parameters are not the model's")
        trained = [p for p in self._names if p.requires_grad]
        if not trained:
            raise InvalidArgument("model: no parameter requires a gradient")
        self._buckets = _buckets(trained)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        self._order = {p: k for k, p in enumerate(trained)}
        self._used = torch.zeros(len(trained), dtype=torch.uint8)
        """Which parameters have a gradient on any member"""
        self._sent = 0
        """Buckets, in their order: it has to be the same on all members"""
        self._round: sync.SyncRound | None = None
        self._begun = False
        self._held_back = False
        self._known = -1
        """How many peers the group had let in when this one synchronized last"""
        self._handles = [p.register_post_accumulate_grad_hook(self._have) for p in trained]  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Leave the model as it was given."""
        for handle in self._handles:
            handle.remove()

    # --- a step -------------------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Begin a step; returns how many were committed before it. Newcomers enter here, and have what the others have when this returns.

        Gradients are set to None.

        Raises:
            PcclError: this peer cannot go on (see `pccl.sync.Communicator.update`).
        """
        if self._begun:
            self._give_up()
        self.comm.update()
        admissions = self.comm.admissions
        if admissions != self._known:
            self._synchronize()
            self._known = admissions
        for p in self._names:
            p.grad = None
        self._begun = True
        return self.step

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here only add to this member's gradients; the one after it sends the sum."""
        self._held_back = True
        try:
            yield
        finally:
            self._held_back = False

    def should_commit(self) -> bool:
        """Whether the step is committed: then every member's gradients are the average, and all have to call ``optimizer.step()``.

        If it is not, on no member, since too few are left or too many were lost, the gradients are gone: begin again.

        Raises:
            PcclError: this peer cannot go on.
        """
        averages = self._open()
        for bucket in self._buckets[self._sent :]:
            self._send(bucket)
        for p, k in self._order.items():
            self._used[k] = p.grad is not None
        averages.all_reduce(self._used, op="max")
        self._round, self._begun = None, False
        self._reset()
        try:
            averages.__exit__(None, None, None)
        except (CollectiveAborted, TooFewPeers):
            for p in self._names:
                p.grad = None
            return False
        for bucket in self._buckets:
            for p, place in zip(bucket.parameters, bucket.places, strict=True):
                if self._used[self._order[p]]:
                    p.grad = place.clone() if p.grad is None else p.grad.copy_(place)
        self.step += 1
        return True

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _have(self, p: Tensor) -> None:
        """A gradient is complete."""
        if self._held_back:
            return
        bucket = self._bucket_of[p]  # type: ignore[index]
        bucket.missing -= 1
        if bucket.missing < 0:
            raise InvalidArgument("a second backward pass in one step: make the others within no_sync()")
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: _Bucket) -> None:
        for p, place in zip(bucket.parameters, bucket.places, strict=True):
            if p.grad is None:
                place.zero_()
            else:
                place.copy_(p.grad)
        self._open().all_reduce(bucket.flat, op="avg")
        self._sent += 1

    def _open(self) -> sync.SyncRound:
        if self._round is None:
            self._round = self.comm.round(retry=True).__enter__()
        return self._round

    def _reset(self) -> None:
        self._sent = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _give_up(self) -> None:
        """The last step was not finished here, perhaps for an exception out of the loop's body: it ends for all."""
        averages, self._round, self._begun = self._open(), None, False
        self._reset()
        error = RuntimeError("the step was not finished")
        averages.__exit__(type(error), error, None)

    # --- state --------------------------------------------------------------------------------------------------------

    def _synchronize(self) -> None:
        state = self._state()
        begins = self.step == 0 and self.comm.rank > 0  # before any step rank 0 has the say
        info = self.comm.sync_state(state, self.step, strategy="receive" if begins else "elect")
        self.step = info.revision
        parameters = {name: p for p, name in self._names.items()}
        for name, found in info.state.items():
            kind, _, rest = name.partition("/")
            if kind == "number" or (kind == "state" and name not in state):
                p, _, what = rest.rpartition("/")
                self.optimizer.state[parameters[p]][what] = found
            elif kind == "settings":
                changed = {k: tuple(x) if isinstance(x, list) else x for k, x in json.loads(found).items()}
                self.optimizer.param_groups[int(rest)].update(changed)
            elif kind == "value":
                self.values[rest] = found

    def _state(self) -> dict[str, Any]:
        """All that is shared, by kind and name."""
        state: dict[str, Any] = {f"parameter/{name}": p.detach() for p, name in self._names.items()}
        state |= {f"buffer/{name}": b for name, b in self.model.named_buffers()}
        for p, name in self._names.items():
            for what, x in self.optimizer.state.get(p, {}).items():
                state[f"{'state' if isinstance(x, Tensor) else 'number'}/{name}/{what}"] = x
        for k, group in enumerate(self.optimizer.param_groups):
            settings = {name: x for name, x in group.items() if name != "params"}
            try:
                state[f"settings/{k}"] = json.dumps(settings, sort_keys=True)
            except TypeError:
                raise InvalidArgument(f"optimizer: settings that are numbers or text are needed, not {settings}") from None
        return state | {f"value/{name}": x for name, x in self.values.items()}


def _buckets(parameters: list[nn.Parameter]) -> list[_Bucket]:
    """In about the order in which gradients come: that of the parameters, reversed."""
    made: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        most = FIRST_BUCKET_BYTES if len(made) == 1 else BUCKET_BYTES
        if not made or made[-1][0].dtype != p.dtype or made[-1][0].device != p.device or size + p.nbytes > most:
            made.append([])
            size = 0
        made[-1].append(p)
        size += p.nbytes
    return [_Bucket(bucket) for bucket in made]
