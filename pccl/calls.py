"""Collectives as operations: a caller's tensors, an algorithm, and attempts to bring them together.

A `Part` is one collective with its buffers; a plain call has one, a round has several that commit together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pccl.collectives.coded import CodedTransfer
from pccl.collectives.flow import CallKey, Moving
from pccl.collectives.lane import Lane
from pccl.collectives.planner import WINDOW
from pccl.collectives.pull import LOCAL, Pull
from pccl.collectives.quantize import block_of, record_type
from pccl.collectives.reduction import Kernels
from pccl.collectives.tensors import DeviceMemory, Memory, allocate_like, memory_of
from pccl.collectives.transfer import Transfer, Undo
from pccl.collectives.volley import Volley
from pccl.core.dtypes import ReduceOp, dtype_named
from pccl.core.errors import CollectiveAborted, PcclError
from pccl.core.quantization import Quantization
from pccl.core.types import Info, Pair, RoundInfo, Tag, View
from pccl.operations import Operation, signature
from pccl.protocol.record import Outcome, Record, State
from pccl.route import Ask, Route, misfit
from pccl.staging import Pinned, Side, Staging

if TYPE_CHECKING:
    from pccl.engine import Engine

Array = npt.NDArray[Any]

SMALL = 64 << 10
"""Bytes up to which a call is worth no hand-over between threads."""


class Reduction:
    """The arithmetic of one attempt."""

    def __init__(self, kernels: Kernels, op: ReduceOp, world: int, *, everywhere: bool) -> None:
        self._kernels = kernels
        self._op = op
        self._world = world
        self._everywhere = everywhere
        """Each member folds for itself: NaNs have to be made alike."""

    def combine(self, out: Array, a: Array, b: Array) -> None:
        """out = a op b"""
        self._kernels.combine(self._op, out, a, b)

    def fold(self, out: Array, parts: list[Array], final: bool) -> None:
        """out = parts[0] op parts[1] op ..."""
        self._kernels.fold(
            self._op, out, parts, divide_by=self._world if final and self._op.name == "avg" else 1, canonical=self._everywhere
        )

    def quick(self, dtype: np.dtype[Any]) -> Callable[..., None] | None:
        """See `Kernels.quick`."""
        return self._kernels.quick(self._op, dtype, self._world)

    def finish(self, x: Array) -> None:
        """avg divides."""
        self._kernels.finish(self._op, x, self._world)


@lru_cache(maxsize=4096)
def _part_signature(description: str, root: int, algorithm: str, accumulate: bool) -> int:
    return signature(f"{description} root {root} by {algorithm}{' in float32' if accumulate else ''}")


@lru_cache(maxsize=4096)
def _call_signature(part: int, atomic: bool, retry: bool) -> int:
    marks = [name for name, on in (("atomic=False", not atomic), ("retry", retry)) if on]
    return signature(f"{part} {' '.join(marks)}")


class Part:
    """One collective and its buffers.

    Args:
        x: what this member gives; None where it gives nothing.
        out: what it gets; None where it gets nothing, or where it is to be made (``like``).
        root: uid of the root, -1 if there is none.
        like: the caller's tensor that a new result is to be like.
        accumulate: half floats travel and are summed in float32.
        quantization: what travels instead of the elements.
    """

    def __init__(
        self,
        collective: str,
        description: str,
        *,
        x: Memory | None,
        out: Memory | None,
        op: ReduceOp | None = None,
        root: int = -1,
        like: Any = None,
        algorithm: str = "auto",
        accumulate: bool = False,
        quantization: Quantization | None = None,
        in_place: bool = False,
        inside: bool = False,
        pair: Pair | None = None,
    ) -> None:
        self.collective = collective
        self.description = description
        self.signature = _part_signature(description, root, algorithm, accumulate)
        self.done = False
        self.info: Info | None = None
        some = x if x is not None else out
        assert some is not None
        self.dtype = some.dtype
        self._x = x
        self._out = out
        self._op = op or ReduceOp("sum")
        self._like = like
        self._work = dtype_named("float32") if accumulate and self.dtype.half else self.dtype
        given, got = -1 if x is None else x.count, -1 if out is None else out.count
        self._quantization = quantization
        itemsize, block = self._work.itemsize, 0
        if quantization:
            itemsize, block = record_type(quantization).itemsize, block_of(quantization)
        self.ask = Ask(collective, algorithm, given, got, itemsize, block, root, pair)
        self.nbytes = some.count * some.dtype.itemsize
        self.on_gpu = isinstance(x, DeviceMemory) or isinstance(out, DeviceMemory)
        self._in_place = in_place
        self._inside = inside
        """The smaller of input and output lies within the other one."""
        self.pair = pair
        self._out_now: Memory | None = None
        self._made: Any = None
        """A result that was allocated"""
        self._source: Array | None = None
        self._target: Array | None = None
        self._staged_out = False
        self._undo: Undo | None = None
        self._spares: list[npt.NDArray[np.uint8]] = []
        self._staging: Staging | None = None
        self._pinned: list[Pinned] = []
        self._transfer: Transfer | Volley | Pull | None = None
        self._used = ""

    def hand_over(self) -> None:
        """The caller's thread makes the call now: what it has its GPUs do before comes first."""
        for memory in {self._x, self._out}:
            if memory is not None:
                memory.hand_over()

    @property
    def given_count(self) -> int:
        """Elements of the input; 0 if there is none."""
        return 0 if self._x is None else self._x.count

    @property
    def reduction(self) -> ReduceOp:
        """The operator."""
        return self._op

    @property
    def is_plain(self) -> bool:
        """Whether nothing has to be done to the input before it is sent, or to the result, but to copy them."""
        converted = self._work is not self.dtype or self._op.name == "premul_sum" or self._quantization
        return not (converted or self._inside or self.on_gpu)

    def flat(self, route: Route) -> tuple[Array | None, Array | None, Any] | None:
        """The caller's memory, and what was given for the result or is made for it; None if it is not in one piece."""
        x, out = (self._x if route.gives else None), (self._out if route.gets else None)
        if route.gets and out is None:
            out = memory_of(allocate_like(self._like, self._like_shape(route.world)), "out", write=True)
        if (x is not None and x.flat is None) or (out is not None and out.flat is None):
            return None
        return None if x is None else x.flat, None if out is None else out.flat, None if out is None else out.given

    # --- attempts ---------------------------------------------------------------------------------------------------

    def begin(self, engine: Engine, route: Route, key: CallKey, *, atomic: bool, lane: Lane | None = None, call: int = 0) -> Moving:
        """A transfer for an attempt on this route.

        Args:
            lane: of a route through shared memory.
            call: the signature of the whole call, which members compare there.
        """
        self._stage(engine, route, atomic)
        self._used = route.algorithm
        arithmetic = self.arithmetic(engine.kernels, route.world, everywhere=route.everywhere)
        source, target, flows, staging = self._source, self._target, route.flows, self._staging
        supply = staging.supply if staging else None
        if route.errand:
            assert lane
            self._transfer = Pull(
                engine.executor, key, call, lane, route.uids, route.errand, source, target, arithmetic, commits=atomic, supply=supply
            )
            return self._transfer
        if route.short and staging is None and source is not None and target is not None:
            self._transfer = Volley(
                engine.executor, key, self.signature, source, target, arithmetic, flows, rank=route.rank, hub=route.hub, undo=self._undo
            )
            return self._transfer
        assert route.program
        assert route.layout
        what = engine.executor, key, self.signature, route.program, route.layout, source, target, arithmetic, flows
        final = staging.final if staging else None
        if self._quantization:
            self._transfer = CodedTransfer(
                *what,
                undo=self._undo,
                window=WINDOW,
                supply=supply,
                codec=engine.codec,
                quantization=self._quantization,
                count=route.segment,
            )
        else:
            self._transfer = Transfer(*what, undo=self._undo, window=WINDOW, supply=supply, final=final)
        return self._transfer

    def arithmetic(self, kernels: Kernels, world: int, *, everywhere: bool = False) -> Reduction:
        """Its reduction."""
        return Reduction(kernels, self._op, world, everywhere=everywhere)

    def copy(self, op: Operation) -> None:
        """The transfer has been started: copy to and from GPUs while it runs."""

        def done() -> None:
            self.done = True
            op.engine.moved(op)

        if self._staging:
            assert isinstance(self._transfer, (Transfer, Pull))
            self._staging.start(op, self._transfer, done)

    def moved(self) -> None:
        """The transfer is complete."""
        if self._staging:
            self._staging.moved()
        else:
            self.done = True

    def _stage(self, engine: Engine, route: Route, atomic: bool) -> None:
        """Say where the attempt reads from and writes to: the caller's memory where that is possible, copies where it is not."""
        self.release(engine)
        gives, gets = route.gives, route.gets
        x, out = (self._x if gives else None), (self._out if gets else None)
        if gets and out is None:
            shape = self._like_shape(route.world)
            self._made = allocate_like(self._like, shape)
            out = memory_of(self._made, "out", write=True)
            if isinstance(out, DeviceMemory) and isinstance(self._x, DeviceMemory):
                out.lend(self._x)
        convert = self._work is not self.dtype
        scale = self._op.name == "premul_sum"
        same = self._in_place and gives and gets
        copy_in = x is not None and (x.flat is None or convert or scale or (self._inside and route.given_segments == 1))
        copy_out = out is not None and (out.flat is None or convert or (self._inside and route.given_segments > 1))
        self._source = self._target = None
        given: Side | None = None
        if x is not None:
            if isinstance(x, DeviceMemory):
                given = self._given_side(engine, x)
            elif copy_in:
                self._source = self._take(engine, x.count)
                self._fill(engine, x, self._source)
            else:
                self._source = x.flat
        if out is not None:
            count = x.count // route.given_segments * route.got_segments if x is not None else out.count
            if isinstance(out, DeviceMemory):
                kept = same and self.collective == "broadcast"  # whose root keeps what it gives
                got = self._got_side(engine, out, count, given if same else None)
                self._staging = Staging(engine, given, None if kept else got, early=not (atomic and (same or self._inside)))
            elif same and copy_in:
                self._target = self._source
                self._staged_out = True
            elif copy_out:
                self._target = self._take(engine, count)
                self._staged_out = True
            else:
                assert out.flat is not None
                self._target = out.flat[:count]
        if given and not self._staging:
            self._staging = Staging(engine, given, None, early=False)
        self._out_now = out
        kept = self.collective == "broadcast" and not self._quantization  # its root keeps what it gives
        if same and not route.errand and atomic and not copy_in and not kept:
            assert self._target is not None
            memory = self._target.view(np.uint8)
            spare = engine.spare(memory.nbytes)
            self._spares.append(spare)
            self._undo = Undo(memory, spare)

    def _like_shape(self, world: int) -> tuple[int, ...]:
        assert self._x is not None
        shape = self._x.shapes[0] if len(self._x.shapes) == 1 else (self._x.count,)
        if self.collective in ("all_gather", "gather"):
            return (world, *shape)
        if self.collective == "reduce_scatter":
            return (shape[0] // world, *shape[1:]) if shape and shape[0] % world == 0 else (self._x.count // world,)
        return shape

    def _take(self, engine: Engine, count: int) -> Array:
        spare = engine.spare(count * self._work.itemsize)
        self._spares.append(spare)
        return spare[: count * self._work.itemsize].view(self._work.numpy)

    def _given_side(self, engine: Engine, x: DeviceMemory) -> Side:
        """Have the attempt read memory that an input is copied to."""
        pinned, raw = self._pin(engine, x)
        source = self._source = raw if self._work is self.dtype else self._take(engine, x.count)

        def adapt(start: int, stop: int) -> None:
            part = source[start:stop]
            if source is not raw:
                engine.kernels.convert(part, raw[start:stop])
            engine.kernels.prepare(self._op, part, part)

        return Side(x, pinned, x.count, adapt)

    def _got_side(self, engine: Engine, out: DeviceMemory, count: int, given: Side | None) -> Side:
        """Have the attempt write to memory that an output is copied from.

        Args:
            given: the input, if it is the same tensors.
        """
        if given:
            pinned, raw = given.pinned, given.pinned.bytes[: out.nbytes].view(self.dtype.numpy)
            target = self._source
        else:
            pinned, raw = self._pin(engine, out)
            target = raw[:count] if self._work is self.dtype else self._take(engine, count)
        self._target = target

        def adapt(start: int, stop: int) -> None:
            if self._work is not self.dtype:
                assert target is not None
                engine.kernels.convert(raw[start:stop], target[start:stop])

        return Side(out, pinned, count, adapt)

    def _pin(self, engine: Engine, memory: Memory) -> tuple[Pinned, Array]:
        pinned = engine.pinned.take(memory.nbytes)
        self._pinned.append(pinned)
        return pinned, pinned.bytes[: memory.nbytes].view(self.dtype.numpy)

    def _fill(self, engine: Engine, x: Memory, into: Array) -> None:
        """Copy the input, converted and scaled as the call wants it."""
        if self._work is self.dtype:
            if x.flat is not None:
                into[:] = x.flat
            else:
                x.pack(into)
        else:
            flat = x.flat
            if flat is None:
                flat = np.empty(x.count, self.dtype.numpy)
                x.pack(flat)
            engine.kernels.convert(into, flat)
        engine.kernels.prepare(self._op, into, into)

    @property
    def pull(self) -> Pull | None:
        """What moves it, if that goes through shared memory."""
        return self._transfer if isinstance(self._transfer, Pull) else None

    # --- the end ----------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Give the caller its input back, bit for bit."""
        if isinstance(self._transfer, Pull):
            self._transfer.withdraw()
        if self._undo:
            self._undo.restore()
        original = self._x.flat if self._inside and self._x is not None else None
        if original is not None and self._source is not None and self._source is not original:
            original[:] = self._source  # another member's segment may have been written over it

    def commit(self, engine: Engine, view: View, began: float, attempts: int) -> Info:
        """The caller has its result."""
        if isinstance(self._transfer, Pull):
            self._transfer.conclude()
        out = self._out_now
        if self._staging:
            self._staging.commit()
        if self._staged_out and out is not None and self._target is not None:
            result = self._target
            if self._work is not self.dtype:
                half = np.empty(len(result), self.dtype.numpy)
                engine.kernels.convert(half, result)
                result = half
            if out.flat is not None:
                out.flat[: len(result)] = result
            else:
                out.unpack(result)
        moved = self._transfer
        self.info = Info(
            self.description,
            view.epoch,
            view.members if self.pair is None else tuple(m for m in view.members if m.uid in self.pair),
            self._used,
            moved.bytes_sent if moved else 0,
            moved.bytes_received if moved else 0,
            engine.now() - began,
            attempts,
            None if out is None else out.given,
        )
        self.release(engine)
        return self.info

    def release(self, engine: Engine) -> None:
        """Hold no memory beyond the caller's."""
        if self._staging:
            self._staging.stop()
        for pinned in self._pinned:
            engine.pinned.give(pinned)
        self._pinned.clear()
        for spare in self._spares:
            engine.give_spare(spare)
        self._spares.clear()
        if self._transfer:
            self._transfer.forget()
        self._undo = self._transfer = self._staging = None
        self._staged_out = False
        self._source = self._target = None


def call_signature(part: Part, atomic: bool, retry: bool) -> int:
    """The signature of a plain call."""
    return _call_signature(part.signature, atomic, retry)


def is_local(part: Part) -> bool:
    """Whether an untagged plain call of this goes through shared memory among members that have some."""
    return part.pair is None and not part.ask.block and part.ask.algorithm in ("auto", LOCAL)


class _Parts(Operation):
    """What calls and rounds share."""

    parts: list[Part]
    _now: View
    """The membership of the present attempt: those who contribute"""
    _streak = 0
    """Attempts in a row that ended without a loss"""

    def can_retry(self, view: View) -> bool:
        """The buffers have to fit."""
        return not any(misfit(part.ask, view) for part in self.parts)

    def begin(self, view: View, record: Record) -> None:
        """Start an attempt of every part."""
        self._streak = 0 if view.lost or view.left or record.attempts == 1 else self._streak + 1
        if self._streak >= 3:
            reason = "three attempts in a row were aborted although no peer was lost"
            survivors = tuple(m.name for m in view.members)
            raise CollectiveAborted(f"{self.description}: {reason}", call=self.description, reason=reason, survivors=survivors)
        self._record = record
        self._now = view
        for part in self.parts:
            part.done = False
        for k, part in enumerate(self.parts):
            self._begin_part(part, k)
            if record.state is not State.RUNNING:  # what had come of it was not of this call
                return

    def resume(self, engine: Engine, view: View, began: float) -> None:
        """An attempt of every part is under way already."""
        self.engine, self.began = engine, began
        self._record, self._now = self.record, view

    def _begin_part(self, part: Part, k: int) -> None:
        view, record = self._now, self._record
        assert record is not None
        engine, key = self.engine, CallKey(view.epoch, record.id.key, k)
        membership = engine.membership(self.comm)
        local = self.local and membership.near
        route = engine.routes.find(part.ask, view, membership.uid, membership.broken, part.description, local=local)
        lane = engine.lanes.get(self.comm)
        if lane or not local:  # without one, a link is missing: a new epoch is on its way
            engine.run(self, part.begin(engine, route, key, atomic=self.atomic, lane=lane, call=self.signature))
            part.copy(self)

    def transfer_done(self, transfer: Moving) -> None:
        """A part is moved."""
        self.parts[transfer.key.sub].moved()

    def complete(self) -> None:
        """What is not there is found out when the result is handed over."""
        for part in self.parts:
            part.done = True

    def forget(self) -> None:
        """It is over, and knows no tensors any more."""
        super().forget()
        for part in self.parts:
            part.release(self.engine)
        self.parts = []

    def restore(self) -> None:
        """Give the caller all inputs back."""
        for part in self.parts:
            if self.atomic:
                part.restore()
            part.release(self.engine)


class Collective(_Parts):
    """A plain call."""

    def __init__(
        self, comm: int, part: Part, *, tag: Tag, timeout: float | None, atomic: bool, retry: bool, pair: Pair | None = None
    ) -> None:
        sign = call_signature(part, atomic, retry)
        super().__init__(comm, part.description, signature=sign, timeout=timeout, tag=tag, pair=pair, atomic=atomic, retry=retry)
        self.parts = [part]
        self.small = part.nbytes <= SMALL and not part.on_gpu
        self.local = tag is None and is_local(part)

    @property
    def exposed(self) -> bool:  # type: ignore[override]
        """See `Op.exposed`."""
        pull = self.parts[0].pull if self.parts else None
        return pull is not None and pull.ready

    @property
    def decided(self) -> bool:  # type: ignore[override]
        """See `Op.decided`."""
        pull = self.parts[0].pull if self.parts else None
        return pull is not None and pull.committed

    @property
    def waiting(self) -> bool:  # type: ignore[override]
        """See `Op.waiting`."""
        pull = self.parts[0].pull if self.parts else None
        return pull is not None and pull.waiting

    def hand_over(self) -> None:
        """The one part."""
        self.parts[0].hand_over()

    def is_complete(self) -> bool:
        """The one part."""
        return self.parts[0].done

    def result(self, outcome: Outcome, record: Record) -> Info:
        """What the call did."""
        return self.parts[0].commit(self.engine, self._now, self.began, record.attempts)


class Round(_Parts):
    """Calls that commit together. They run as they are made; `seal` says that there are no more."""

    def __init__(self, comm: int, *, tag: Tag, timeout: float | None, retry: bool) -> None:
        super().__init__(comm, "round()", signature=0, timeout=timeout, tag=tag, retry=retry)
        self.parts = []
        self.sealed = False
        self._running = False

    def begin(self, view: View, record: Record) -> None:
        """Run what the body has asked for so far."""
        self._running = True
        super().begin(view, record)

    def add(self, part: Part) -> None:
        """The body makes a call."""
        self.parts.append(part)
        if self._running and not self.settled:
            try:
                self._begin_part(part, len(self.parts) - 1)
            except PcclError as e:
                self.reason = e
                self.engine.fail(self, str(e))

    def seal(self) -> None:
        """The body is over."""
        self.sealed = True
        self.description = f"round({', '.join(part.description for part in self.parts)})"
        self.signature = signature(f"round of {[part.signature for part in self.parts]}{' retry' if self.retry else ''}")
        self.engine.sealed(self)

    def halt(self) -> None:
        """Calls that the body makes now run with the next attempt."""
        self._running = False
        if not self.sealed:  # a mismatch that was found before the end of the body names what there is
            self.description = f"round({', '.join(part.description for part in self.parts)}, ...)"

    def is_complete(self) -> bool:
        """All parts, once the body is over."""
        return self.sealed and all(part.done for part in self.parts)

    def result(self, outcome: Outcome, record: Record) -> RoundInfo:
        """What the round did."""
        infos = tuple(part.commit(self.engine, self._now, self.began, record.attempts) for part in self.parts)
        return RoundInfo(self._now.epoch, self._now.members, infos, self.engine.now() - self.began, record.attempts)
