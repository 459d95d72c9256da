"""The calls that a communicator and a round offer, whatever becomes of them: awaited, waited for, or recorded.

Each method checks its arguments in the caller's thread, makes a `Part`, and hands it to `_do`, which the faces define.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypedDict, TypeGuard, TypeVar, Unpack

import numpy as np

from pccl.calls import Collective, Part
from pccl.collectives.planner import check_algorithm
from pccl.collectives.schedules.meaning import COLLECTIVES, ROOTED, segments
from pccl.collectives.tensors import Memory, Overlap, memory_of, overlap
from pccl.core.dtypes import ReduceOp, reduce_op
from pccl.core.errors import InvalidArgument
from pccl.core.options import check_timeout
from pccl.core.quantization import Quantization, quantization
from pccl.core.types import Member, Pair, Tag, View
from pccl.operations import Operation, Split
from pccl.route import Ask
from pccl.runtime import Runtime, closed_error

R = TypeVar("R")


class How(TypedDict, total=False):
    """Keywords that every collective takes."""

    tag: Tag
    """Calls with a tag have an order of their own, so that they may be made in any order relative to others. Default None."""
    timeout: float | None
    """Seconds for all attempts together; the default is the communicator's. None waits for ever."""
    atomic: bool
    """Commit on all members or give all of them their inputs back (the default). False is faster and promises neither."""
    retry: bool
    """After a loss, go on with the survivors until the call commits. Default False."""
    algorithm: str
    """Default "auto"."""
    async_op: bool
    """Blocking face only: return a `Work` at once. Default False."""


KEYWORDS = frozenset(How.__annotations__)


class Collectives(ABC, Generic[R]):
    """The collectives. In each, all members of the communicator make the same call.

    Tensors are numpy arrays, torch tensors on the CPU or on a CUDA device, objects with a writable buffer, or lists of such things of one
    dtype and on one device, which travel as one. For a CUDA tensor a call comes after all that the current stream was given before;
    when it has ended, the result is there for all streams. All raise

    Raises:
        InvalidArgument: before anything has happened.
        CollectiveAborted: a peer was lost or left, a link failed, or another member cancelled the call or could not go on.
        CollectiveMismatch: the members' calls are not the same.
        CollectiveTimeout: the deadline passed on some member.
        TooFewPeers: the group is smaller than its min_world_size.
        Evicted: this peer is no longer in the group.

    After an error inputs are as they were before the call, bit for bit, and outputs are undefined; with ``atomic=False`` all buffers are.
    """

    @abstractmethod
    def _do(self, part: Part, how: How) -> R:
        """Make the call."""

    @abstractmethod
    def _view(self) -> View:
        """The membership that the caller knows."""

    @abstractmethod
    def _uid(self) -> int:
        """This peer's."""

    # --- collectives ------------------------------------------------------------------------------------------------

    def all_reduce(
        self,
        x: Any,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        accumulate: str | None = None,
        quantize: str | Quantization | None = None,
        **how: Unpack[How],
    ) -> R:
        """Combine every member's tensor, element by element; every member gets the result, the same to the bit.

        Args:
            x: the input, of the same dtype and number of elements on all members; also the output if there is no other.
            op: "sum", "avg", "prod", "min", "max", "band", "bor", "bxor" or `premul_sum(factor)`.
            out: where the result goes, like x; may be x.
            accumulate: "float32" lets half floats travel and add up in float32, at twice the bytes.
            quantize: what floats travel as: "uint8", "int8", "uint4", "bfloat16", "float16", or a `Quantization`. They add up in float32.
                docs/quantization.md says what precision is left.
        """
        return self._do(self._all_reduce(x, op, how, out=out, accumulate=accumulate, quantize=quantize), how)

    def _all_reduce(
        self,
        x: Any,
        op: str | ReduceOp,
        how: How,
        *,
        out: Any = None,
        accumulate: str | None = None,
        quantize: str | Quantization | None = None,
    ) -> Part:
        given = result = memory_of(x, "x", write=out is None)
        reduction = reduce_op(op, given.dtype)
        coded = _quantization(quantize, given, reduction, accumulate)
        where = Overlap.SAME if given.count else Overlap.NONE
        if out is not None:
            result = memory_of(out, "out", write=True)
            self._same_size("out", result, "x", given, 1)
            where = self._overlap(given, result)
        return Part(
            "all_reduce",
            f"all_reduce({_of(given)}, {reduction.name}{_half(accumulate, given)}{_as(coded)})",
            x=given,
            out=result,
            op=reduction,
            in_place=where is Overlap.SAME,
            algorithm=_algorithm("all_reduce", how),
            accumulate=accumulate is not None,
            quantization=coded,
        )

    def reduce(
        self, x: Any, root: int = 0, op: str | ReduceOp = "sum", *, out: Any = None, accumulate: str | None = None, **how: Unpack[How]
    ) -> R:
        """Combine every member's tensor; the member of rank `root` gets the result, in `out` or in x. See `all_reduce`."""
        given = memory_of(x, "x")
        member, am_root = self._root(root)
        reduction = reduce_op(op, given.dtype)
        result = memory_of(x if out is None else out, "x" if out is None else "out", write=True) if am_root else None
        where = Overlap.NONE
        if result is not None:
            self._same_size("out", result, "x", given, 1)
            where = self._overlap(given, result)
        return self._do(
            Part(
                "reduce",
                f"reduce({_of(given)}, {reduction.name}, root={root}{_half(accumulate, given)})",
                x=given,
                out=result,
                op=reduction,
                root=member.uid,
                in_place=where is Overlap.SAME,
                algorithm=_algorithm("reduce", how),
                accumulate=accumulate is not None,
            ),
            how,
        )

    def reduce_scatter(
        self,
        x: Any,
        op: str | ReduceOp = "sum",
        *,
        out: Any = None,
        accumulate: str | None = None,
        quantize: str | Quantization | None = None,
        **how: Unpack[How],
    ) -> R:
        """Combine every member's tensor; member r gets the r-th of `world_size` equal parts of the result.

        Args:
            x: the input; its number of elements is a multiple of the world size.
            out: a world_size-th of x; may be this member's own part of x. Allocated where not given.
            quantize: as in `all_reduce`; the result itself, which does not travel, is not quantized.
        """
        given, world = memory_of(x, "x"), self._view().world_size
        reduction = reduce_op(op, given.dtype)
        coded = _quantization(quantize, given, reduction, accumulate)
        if given.count % world:
            raise InvalidArgument(f"x: its {given.count} elements are not a multiple of the world size, {world}")
        result, inside = None, False
        if out is not None:
            result = memory_of(out, "out", write=True)
            self._same_size("x", given, "out", result, world)
            inside = self._inside(whole=given, part=result)
        return self._do(
            Part(
                "reduce_scatter",
                f"reduce_scatter({_of(given)}, {reduction.name}{_half(accumulate, given)}{_as(coded)})",
                x=given,
                out=result,
                op=reduction,
                like=x,
                inside=inside,
                algorithm=_algorithm("reduce_scatter", how),
                accumulate=accumulate is not None,
                quantization=coded,
            ),
            how,
        )

    def all_gather(self, x: Any, *, out: Any = None, quantize: str | Quantization | None = None, **how: Unpack[How]) -> R:
        """Every member gets the tensors of all, one after the other in rank order.

        Args:
            x: of the same dtype and number of elements on all members; may be this member's own part of out.
            out: world_size times x; allocated with shape ``(world_size, *x.shape)`` where not given.
            quantize: as in `all_reduce`. This member's own part of the result, too, is what the others get.
        """
        given = memory_of(x, "x")
        coded = _quantization(quantize, given)
        result, inside = None, False
        if out is not None:
            result = memory_of(out, "out", write=True)
            self._same_size("out", result, "x", given, self._view().world_size)
            inside = self._inside(whole=result, part=given)
        return self._do(
            Part(
                "all_gather",
                f"all_gather({_of(given)}{_as(coded)})",
                x=given,
                out=result,
                like=x,
                inside=inside,
                algorithm=_algorithm("all_gather", how),
                quantization=coded,
            ),
            how,
        )

    def broadcast(self, x: Any, root: int = 0, *, quantize: str | Quantization | None = None, **how: Unpack[How]) -> R:
        """Every member's x becomes that of the member of rank `root`. After an error, x is undefined elsewhere than there.

        With `quantize` (see `all_reduce`) the root's x, too, becomes what the others get.
        """
        member, am_root = self._root(root)
        given = memory_of(x, "x", write=not am_root or quantize is not None)
        coded = _quantization(quantize, given)
        description = f"broadcast({_of(given)}, root={root}{_as(coded)})"
        part = Part(
            "broadcast",
            description,
            x=given if am_root else None,
            out=given,
            root=member.uid,
            in_place=True,
            algorithm=_algorithm("broadcast", how),
            quantization=coded,
        )
        return self._do(part, how)

    def gather(self, x: Any, root: int = 0, *, out: Any = None, **how: Unpack[How]) -> R:
        """The member of rank `root` gets the tensors of all, as in `all_gather`; elsewhere `out` is not looked at."""
        given = memory_of(x, "x")
        member, am_root = self._root(root)
        result, inside = None, False
        if out is not None and am_root:
            result = memory_of(out, "out", write=True)
            self._same_size("out", result, "x", given, self._view().world_size)
            inside = self._inside(whole=result, part=given)
        description = f"gather({_of(given)}, root={root})"
        part = Part(
            "gather",
            description,
            x=given,
            out=result,
            root=member.uid,
            like=x,
            inside=inside,
            algorithm=_algorithm("gather", how),
        )
        return self._do(part, how)

    def scatter(self, out: Any, x: Any = None, root: int = 0, **how: Unpack[How]) -> R:
        """Member r gets the r-th of `world_size` equal parts of the tensor x that the member of rank `root` gives.

        Args:
            out: where this member's part goes.
            x: world_size times out; looked at on the root only.
        """
        result = memory_of(out, "out", write=True)
        member, am_root = self._root(root)
        given, inside = None, False
        if am_root:
            if x is None:
                raise InvalidArgument("x: the root of a scatter has to give one")
            given = memory_of(x, "x")
            self._same_size("x", given, "out", result, self._view().world_size)
            inside = self._inside(whole=given, part=result)
        description = f"scatter({_of(result)}, root={root})"
        part = Part("scatter", description, x=given, out=result, root=member.uid, inside=inside, algorithm=_algorithm("scatter", how))
        return self._do(part, how)

    def all_to_all(self, x: Any, *, out: Any = None, **how: Unpack[How]) -> R:
        """Member s's r-th of `world_size` equal parts goes to member r, as its s-th part.

        Args:
            x: the input; its number of elements is a multiple of the world size.
            out: like x, and elsewhere in memory; allocated where not given.
        """
        given, world = memory_of(x, "x"), self._view().world_size
        if given.count % world:
            raise InvalidArgument(f"x: its {given.count} elements are not a multiple of the world size, {world}")
        result = None
        if out is not None:
            result = memory_of(out, "out", write=True)
            self._same_size("out", result, "x", given, 1)
            if overlap(given, result) is not Overlap.NONE:
                raise InvalidArgument("out: all_to_all cannot work in place: out must not overlap x")
        description = f"all_to_all({_of(given)})"
        return self._do(Part("all_to_all", description, x=given, out=result, like=x, algorithm=_algorithm("all_to_all", how)), how)

    def barrier(self, **how: Unpack[How]) -> R:
        """Return when every member has made this call."""
        token = memory_of(np.zeros(1, np.uint8), "token", write=True)
        part = Part(
            "all_reduce", "barrier()", x=token, out=token, op=ReduceOp("bor"), in_place=True, algorithm=_algorithm("all_reduce", how)
        )
        return self._do(part, how)

    # --- point to point ---------------------------------------------------------------------------------------------

    def send(self, x: Any, dst: int, **how: Unpack[How]) -> R:
        """Send a tensor to the member of rank `dst`, which makes the matching `recv`.

        The n-th send from one member to another (with the same tag) meets the n-th recv there, in whatever order either makes them
        relative to its other calls.
        """
        given = memory_of(x, "x")
        pair = Pair(self._uid(), self._peer("dst", dst).uid)
        description = f"sendrecv({_of(given)})"
        return self._do(Part("sendrecv", description, x=given, out=None, pair=pair, algorithm=_algorithm("sendrecv", how)), how)

    def recv(self, x: Any, src: int, **how: Unpack[How]) -> R:
        """Receive into x what the member of rank `src` sends; see `send`. After an error, x is undefined."""
        result = memory_of(x, "x", write=True)
        pair = Pair(self._peer("src", src).uid, self._uid())
        description = f"sendrecv({_of(result)})"
        return self._do(Part("sendrecv", description, x=None, out=result, pair=pair, algorithm=_algorithm("sendrecv", how)), how)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _root(self, root: int) -> tuple[Member, bool]:
        member = self._rank("root", root)
        return member, member.uid == self._uid()

    def _peer(self, name: str, rank: int) -> Member:
        member = self._rank(name, rank)
        if member.uid == self._uid():
            raise InvalidArgument(f"{name}: {rank} is this member itself")
        return member

    def _rank(self, name: str, rank: int) -> Member:
        members = self._view().members
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 0 <= rank < len(members):
            raise InvalidArgument(f"{name}: a rank from 0 to {len(members) - 1} is needed, not {rank!r}")
        return members[rank]

    def _same_size(self, name: str, one: Memory, other_name: str, other: Memory, times: int) -> None:
        """The one has to be so many times as large as the other, and of its dtype."""
        if one.dtype is not other.dtype:
            raise InvalidArgument(f"{name}: its dtype {one.dtype} is not that of {other_name}, {other.dtype}")
        if one.count != times * other.count:
            needed = f"{times} times {other_name}'s {other.count}" if times > 1 else f"as many as {other_name}, {other.count}"
            raise InvalidArgument(f"{name}: {one.count} elements, but {needed} are needed")

    def _overlap(self, given: Memory, result: Memory) -> Overlap:
        where = overlap(given, result)
        if where is Overlap.PARTIAL:
            raise InvalidArgument("out: it overlaps x without being the same memory")
        return where

    def _inside(self, *, whole: Memory, part: Memory) -> bool:
        """Whether one buffer is this member's own part of the other; otherwise they must not overlap."""
        if overlap(whole, part) is Overlap.NONE:
            return False
        if part.address() is None or whole.address(self._view().rank * part.count) != part.address():
            raise InvalidArgument("out: it overlaps x, but the smaller one is not this member's own part of the larger one")
        return True


class Handle(Collectives[R]):
    """What the communicators of both faces have in common: an engine somewhere, and the membership that their caller knows."""

    def __init__(self, runtime: Runtime, comm: int, view: View, timeout: float | None) -> None:
        self._runtime = runtime
        self._comm = comm
        self._seen = view
        self._timeout = timeout
        self._me = view.members[view.rank].uid
        self._departed = runtime.engine.membership(comm).departed
        self._closed = False

    @property
    def view(self) -> View:
        """The membership as of the last call that ended; `joined`, `left` and `lost` tell what changed last."""
        return self._seen

    @property
    def rank(self) -> int:
        """This member's rank."""
        return self._seen.rank

    @property
    def admissions(self) -> int:
        """How many peers the group has let in since it began, also those that are gone: the same on all members after the same `update`.

        Raises:
            PcclError: this peer is out of its group.
        """
        return self._runtime.engine.membership(0).next_uid

    @property
    def timeout(self) -> float | None:
        """Seconds that calls may take that do not say it themselves; None: no limit. May be set, for calls that are made from then on."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._timeout = check_timeout(seconds)

    @property
    def world_size(self) -> int:
        """Number of members."""
        return self._seen.world_size

    def explain(self, collective: str = "all_reduce", nbytes: int = 1 << 20, *, root: int = 0, algorithm: str = "auto") -> str:
        """How an untagged call on float32 elements runs in the present membership, and why.

        Args:
            collective: "all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter" or "all_to_all".
            nbytes: of each member's input (of the root's output, for a gather).
        """
        known = [c for c in COLLECTIVES if c != "sendrecv"]
        if collective not in known:
            raise InvalidArgument(f"collective: one of {', '.join(known)} is needed, not {collective!r}")
        if not _is_integer(nbytes) or nbytes < 4:
            raise InvalidArgument(f"nbytes: at least the 4 bytes of a float32 are needed, not {nbytes!r}")
        check_algorithm(collective, algorithm)
        member, _ = self._root(root)
        many = segments(collective, self.world_size).source
        count = nbytes // 4 // many * many
        ask = Ask(collective, algorithm, count, -1, 4, 0, member.uid if collective in ROOTED else -1, None)
        return self._runtime.engine.explain(self._comm, ask)

    def __repr__(self) -> str:
        return f"<pccl {type(self).__name__} {self._comm}: {self._seen}{', closed' if self._closed else ''}>"

    def _view(self) -> View:
        return self._seen

    def _uid(self) -> int:
        return self._me

    def _operation(self, part: Part, how: How) -> Collective:
        """The operation that a part and its keywords make."""
        if not KEYWORDS.issuperset(how):
            unknown = how.keys() - KEYWORDS
            raise InvalidArgument(f"{', '.join(sorted(unknown))}: no such keyword; there are {', '.join(How.__annotations__)}")
        atomic = bool(how.get("atomic", True))
        return Collective(
            self._comm,
            part,
            tag=check_tag(how.get("tag")),
            timeout=self._within(how.get("timeout", ...)),
            atomic=atomic,
            retry=check_retry(how.get("retry", False), atomic),
            pair=part.pair,
        )

    def _within(self, timeout: Any) -> float | None:
        """The timeout of a call; `...` stands for the communicator's own."""
        return self._timeout if timeout is ... else check_timeout(timeout)

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()

    def _begin_update(self) -> View:
        if self._comm:
            raise InvalidArgument("update: newcomers enter the whole group; call it on the communicator that connect gave")
        return self._seen

    def _split(self, color: int | None, key: int, timeout: float | None) -> Operation:
        for name, value in (("color", color), ("key", key)):
            if not _is_integer(value) and not (name == "color" and value is None):
                raise InvalidArgument(f"{name}: an integer of 64 bits{' or None' if name == 'color' else ''} is needed, not {value!r}")
        return Split(self._comm, "split()", color=color, order=key, timeout=timeout)

    def _subgroup(self, ranks: Sequence[int], timeout: float | None) -> Operation:
        members = [self._rank("ranks", rank) for rank in ranks]
        if not members or len(set(members)) != len(members):
            raise InvalidArgument(f"ranks: some ranks, each of them once, are needed, not {list(ranks)!r}")
        order = [m.uid for m in members].index(self._me) if any(m.uid == self._me for m in members) else 0
        inside = any(m.uid == self._me for m in members)
        text = f"subgroup({list(map(int, ranks))})"
        return Split(self._comm, text, color=0 if inside else None, order=order, timeout=timeout)

    def _see(self, op: Operation) -> None:
        """A call has ended: its caller now knows the membership."""
        new = op.view
        if new is None or new.epoch <= self._seen.epoch:
            return
        old, departed = self._seen, self._departed
        gone = [m for m in old.members if m not in new.members]
        self._seen = dataclasses.replace(
            new,
            joined=tuple(m for m in new.members if m not in old.members),
            left=tuple(m for m in gone if departed.get(m.uid, False)),
            lost=tuple(m for m in gone if not departed.get(m.uid, False)),
        )

    def _unchanged(self) -> View:
        return dataclasses.replace(self._seen, joined=(), left=(), lost=())


def check_tag(tag: object) -> Tag:
    """A tag as it was given."""
    if tag is None or _is_integer(tag) or (isinstance(tag, str) and len(tag) <= 256 and _is_unicode(tag)):
        return tag
    raise InvalidArgument(f"tag: an integer of 64 bits, a string of up to 256 characters, or None is needed, not {tag!r:.100}")


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether a message can hold it."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_retry(retry: object, atomic: bool) -> bool:
    """`retry` as it was given."""
    if retry and not atomic:
        raise InvalidArgument("retry: a call with atomic=False has no inputs to begin again with")
    return bool(retry)


def _of(x: Memory) -> str:
    return f"{x.dtype}[{x.count}]"


def _half(accumulate: str | None, x: Memory) -> str:
    if accumulate is None:
        return ""
    if accumulate != "float32":
        raise InvalidArgument(f"accumulate: 'float32' or None is needed, not {accumulate!r}")
    if not x.dtype.half:
        raise InvalidArgument(f"accumulate: it is for float16 and bfloat16; x is {x.dtype}")
    return ", accumulate=float32"


def _quantization(quantize: object, x: Memory, op: ReduceOp | None = None, accumulate: str | None = None) -> Quantization | None:
    if quantize is not None and accumulate is not None:
        raise InvalidArgument("accumulate: quantized calls add up in float32 anyway; give quantize or accumulate")
    return quantization(quantize, x.dtype, op)


def _as(coded: Quantization | None) -> str:
    return f", quantize={coded}" if coded else ""


def _algorithm(collective: str, how: How) -> str:
    algorithm = how.get("algorithm", "auto")
    check_algorithm(collective, algorithm)
    return algorithm
