"""sync_state: everyone ends with the same state, to the bit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.collectives.exchange import Exchange, Want
from pccl.collectives.flow import CallKey, Flow
from pccl.collectives.tensors import DeviceMemory, allocate_like, memory_of
from pccl.core import codec
from pccl.core.codec import WireError
from pccl.core.dtypes import dtype_named
from pccl.core.errors import InvalidArgument
from pccl.core.messages import Offer, Truth
from pccl.core.types import StateInfo, Tag, View
from pccl.operations import Operation, signature
from pccl.protocol.record import Outcome, Record
from pccl.snapshot import BLOCK_BYTES, Item, Manifest, Snapshot, digest_of, unpack_manifest

WINDOW = 16
"""Blocks under way to a peer that fetches, from all holders together."""
PER_HOLDER = 8
STRATEGIES = ("elect", "receive", "send")
MANIFEST = -1


class Sync(Operation):
    """One member's part in a sync_state.

    All members offer their revision and a hash of their content; the master elects the truth (`pccl.protocol.election`); those who have
    other content learn the manifest from a holder, fetch the blocks that differ from all holders at once, check each against its hash,
    and keep them aside until everyone is done. If a holder dies, what was fetched stays, and the rest comes from the others.

    Args:
        state: names -> tensors, which are overwritten in place, or int, float, bool, str, bytes, None. Newcomers may lack names:
            what they lack is in `StateInfo.state`, as are all values.
        revision: rises by the caller's hand, usually the step.
        strategy: "elect"; "receive" for a member whose content must not be the truth; "send" for one whose content must.
        declare: state a new truth, whoever took part in what; for when the last holder is gone.
        may_differ: names of tensors that are not compared; newcomers get a copy of somebody's.
    """

    def __init__(
        self,
        comm: int,
        state: Mapping[str, Any],
        revision: int,
        strategy: str,
        declare: bool,
        may_differ: tuple[str, ...],
        *,
        tag: Tag,
        timeout: float | None,
    ) -> None:
        if isinstance(revision, bool) or not isinstance(revision, (int, np.integer)) or not 0 <= revision < 2**63:
            raise InvalidArgument(f"revision: an integer of at least 0 is needed, not {revision!r}")
        if strategy not in STRATEGIES:
            raise InvalidArgument(f"strategy: one of {', '.join(STRATEGIES)} is needed, not {strategy!r}")
        if declare and strategy == "receive":
            raise InvalidArgument("declare: a member with strategy='receive' has nothing to declare")
        super().__init__(
            comm, "sync_state()", signature=signature(f"sync_state({sorted(may_differ)})"), timeout=timeout, tag=tag, retry=True
        )
        self.sealed = False
        self.snapshot = Snapshot(state, may_differ)
        self._revision = int(revision)
        self._strategy = strategy
        self._declare = bool(declare)
        self._truth: Truth | None = None
        self._own = b""
        self._digest = b""
        """Of the truth whose blocks are in `_fetched`"""
        self._manifest: Manifest | None = None
        self._manifest_data = np.empty(0, np.uint8)
        self._fetched: dict[Want, npt.NDArray[np.uint8]] = {}
        """Blocks that were checked, for tensors that this member has"""
        self._new: dict[str, Any] = {}
        """Tensors that this member lacked, as they will be returned"""
        self._new_bytes: dict[int, npt.NDArray[np.uint8]] = {}
        """Their content, or what will be copied there"""
        self._new_on_gpu: dict[int, DeviceMemory] = {}
        self._landing: dict[Want, npt.NDArray[np.uint8]] = {}
        self._todo: deque[Want] = deque()
        self._missing: set[Want] = set()
        self._unchanged: set[Want] = set()
        """Blocks of the truth that this member has already"""
        self._holders: list[int] = []
        self._wrong: set[int] = set()
        """Members that have sent something that is not what its hash says"""
        self._sources: dict[int, str] = {}
        self._exchange: Exchange | None = None
        self._moved = [0, 0]
        self._complete = False
        self._hashing: asyncio.Future[None] | None = None

    def hand_over(self) -> None:
        """All tensors."""
        for tensor in self.snapshot.tensors.values():
            tensor.hand_over()

    # --- before the master knows ------------------------------------------------------------------------------------

    def begin(self, view: View, record: Record) -> None:
        """Open the exchange; hash, if that has not been done."""
        self._names = {m.uid: m.name for m in view.members}
        self._attempt = record
        self._complete = False
        mine = self.engine.membership(0).uid
        flows = [self.engine.executor.flow(m.uid) for m in view.members if m.uid != mine]
        key = CallKey(view.epoch, record.id.key, 0)
        self._exchange = Exchange(key, self.signature, self, flows, self._mismatch)
        self.engine.run(self, self._exchange)
        if not self.sealed and self._hashing is None:
            self._hashing = self.engine.in_thread(self.snapshot.hash)
            self._hashing.add_done_callback(self._hashed)

    def _hashed(self, future: asyncio.Future[None]) -> None:
        if self.settled or future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self.engine.fail(self, f"hashing the state failed: {error!r}")
            return
        self._own = digest_of(self.snapshot.packed)
        self.sealed = True
        self.engine.given(self)

    def payload(self) -> bytes:
        """The offer, once the state is hashed."""
        if not self.sealed:
            return b""
        membership = self.engine.membership(self.comm)
        return codec.encode(
            Offer(
                self._revision,
                self._own,
                digest_of(self.snapshot.manifest.outline()),
                self._strategy,
                self._declare,
                len(self.snapshot.packed),
                membership.took_part,
                membership.synced,
            )
        )

    # --- fetching ---------------------------------------------------------------------------------------------------

    def agreed(self, answer: Any) -> None:
        """The truth is known."""
        assert isinstance(answer, Truth)
        self._truth = answer
        mine = self.engine.membership(0).uid
        self._holders = [uid for uid in self._sources_for(mine, answer.holders) if uid not in self._wrong]
        if answer.digest != self._digest:
            self._digest = answer.digest
            self._manifest = None
            self._fetched.clear()
            self._new.clear()
            self._new_bytes.clear()
            self._new_on_gpu.clear()
        if self._exchange:
            self._exchange.refresh()  # others may have asked already
        if answer.digest == self._own and not self._lacks_differing():
            self._done()
        elif self._manifest is not None:
            self._plan()
        else:
            self._manifest_data = np.empty(answer.manifest_bytes, np.uint8)
            blocks = -(-answer.manifest_bytes // BLOCK_BYTES)
            self._todo = deque(Want(MANIFEST, b) for b in range(blocks))
            self._missing = set(self._todo)
            self._ask_more()

    def _sources_for(self, mine: int, holders: tuple[int, ...]) -> list[int]:
        """Whom to ask: holders, if there is a link to any; otherwise members that are nearer to one, and will have it before."""
        cut = {frozenset(link) for link in self.engine.membership(self.comm).broken}
        distance = {uid: 0 for uid in holders if uid in self._names}
        frontier = list(distance)
        while frontier:
            near = [(u, v) for u in frontier for v in self._names if v not in distance and frozenset((u, v)) not in cut]
            frontier = list(dict.fromkeys(v for _, v in near))
            distance.update((v, distance[u] + 1) for u, v in reversed(near))
        if distance.get(mine, 0) == 0:
            return [uid for uid in holders if uid != mine and frozenset((uid, mine)) not in cut]
        nearer = [u for u, d in distance.items() if d == distance[mine] - 1 and frozenset((u, mine)) not in cut]
        return sorted(nearer)

    def _lacks_differing(self) -> bool:
        """Whether this member, with the same content otherwise, needs copies of tensors that may differ."""
        return bool(self.snapshot.may_differ and self._holders) and self._is_new()

    def _is_new(self) -> bool:
        """Whether the communicator has synced before, without this member."""
        membership = self.engine.membership(self.comm)
        return membership.took_part == 0 and membership.synced > 0

    def _plan(self) -> None:
        """Compare the truth with what this member has, and fetch what differs."""
        assert self._manifest is not None
        snapshot = self.snapshot
        known = {item.name: item for item in snapshot.manifest.items}
        conflict = self._conflict(known)
        if conflict:
            self.engine.conflict(self, conflict)
            return
        wants: list[Want] = []
        fresh = self._is_new()
        for i, item in enumerate(self._manifest.items):
            if not item.dtype:
                continue
            have = known.get(item.name)
            if have is None:
                self._allocate(i, item)
                wants += [Want(i, b) for b in range(item.blocks)]
            elif item.content is None:
                wants += [Want(i, b) for b in range(item.blocks)] if fresh else []
            elif have.content is None or have.content != item.content:
                wants += [Want(i, b) for b in range(item.blocks) if have.content is None or have.hash_of(b) != item.hash_of(b)]
        everything = {Want(i, b) for i, item in enumerate(self._manifest.items) for b in range(item.blocks)}
        self._unchanged = everything.difference(wants)
        self._todo = deque(w for w in wants if w not in self._fetched)
        self._missing = set(self._todo)
        if self._missing:
            self._ask_more()
        else:
            self._done()

    def _conflict(self, known: dict[str, Item]) -> str:
        """Why this member's state cannot become the truth; empty if it can."""
        assert self._manifest is not None
        truth = {item.name: item for item in self._manifest.items}
        for name, mine in known.items():
            theirs = truth.get(name)
            if theirs is None:
                return f"its state has {name!r}, which the others do not know"
            if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                return f"its {name!r} is {_kind(mine)}, that of the others {_kind(theirs)}"
        return ""

    def _allocate(self, i: int, item: Item) -> None:
        """Memory for a tensor that this member lacks; kept from attempt to attempt."""
        if item.name in self._new:
            return
        like = next(iter(self.snapshot.tensors.values()), None)
        made = allocate_like(np.empty(0) if like is None else like.given, item.shape, dtype=dtype_named(item.dtype))
        self._new[item.name] = made
        memory = memory_of(made, item.name, write=True)
        if isinstance(memory, DeviceMemory) and isinstance(like, DeviceMemory):
            memory.lend(like)
            self._new_on_gpu[i] = memory
            self._new_bytes[i] = np.empty(item.nbytes, np.uint8)
        else:
            assert memory.flat is not None
            self._new_bytes[i] = memory.flat.view(np.uint8)

    def _ask_more(self) -> None:
        """Keep every holder busy, up to the window."""
        exchange = self._exchange
        if exchange is None or exchange.halted:
            return
        holders = [uid for uid in self._holders if uid in self._names]
        if not holders and self._missing:
            self.engine.fail(self, "no other member holds the state")
            return
        if self._manifest is None:
            holders = holders[:1]  # its hash is that of the whole: who has sent it is to blame
        room = WINDOW - sum(exchange.due(uid) for uid in holders)
        while self._todo and room > 0:
            uid = min(holders, key=exchange.due)
            if exchange.due(uid) >= PER_HOLDER:
                break
            wants: list[Want] = []
            while self._todo and len(wants) < 4 and room > 0:
                wants.append(self._todo.popleft())
                room -= 1
            self._sources[uid] = self._names[uid]
            exchange.ask(uid, wants)
        self.engine.executor.flush()

    # --- Store ------------------------------------------------------------------------------------------------------

    def read(self, want: Want) -> memoryview | None:
        """A block for somebody else: this member's own if it holds the truth, else one that it has fetched."""
        truth = self._truth
        if truth is None:
            return None
        start, holds = want.block * BLOCK_BYTES, truth.digest == self._own
        if want.block < 0 or want.item < MANIFEST:
            raise WireError(f"a request for {want}")
        if want.item == MANIFEST:
            data = self.snapshot.packed if holds else self._manifest_data.data if self._manifest else None
            block = None if data is None else memoryview(data)[start : start + BLOCK_BYTES]
        else:
            manifest = self.snapshot.manifest if holds else self._manifest
            if manifest is None:
                return None
            if want.item >= len(manifest.items) or want.block >= manifest.items[want.item].blocks:
                raise WireError(f"a request for {want}")
            name = manifest.items[want.item].name
            if holds or want in self._unchanged:
                block = self.snapshot.block(name, want.block).data
            else:
                fetched = self._fetched.get(want)
                block = None if fetched is None else fetched.data
        if block is not None and not len(block):
            raise WireError(f"a request for {want}")
        return block

    def place(self, want: Want) -> memoryview:
        """Where a block goes."""
        if want in self._landing:
            return self._landing[want].data
        start = want.block * BLOCK_BYTES
        if want.item == MANIFEST:
            room = self._manifest_data[start : start + BLOCK_BYTES]
        elif want.item in self._new_bytes:
            room = self._new_bytes[want.item][start : start + BLOCK_BYTES]
        else:
            assert self._manifest is not None
            room = np.empty(min(BLOCK_BYTES, self._manifest.items[want.item].nbytes - start), np.uint8)
        self._landing[want] = room
        return room.data

    def came(self, want: Want, uid: int) -> None:
        """A block is here: check it."""
        data = self._landing.pop(want)
        if want.item == MANIFEST:
            self._missing.discard(want)
            if not self._missing:
                self._read_manifest(uid)
                return
        else:
            assert self._manifest is not None
            expected = self._manifest.items[want.item].hash_of(want.block)
            if expected is not None and digest_of(data) != expected:
                self._todo.append(want)
                self._distrust(uid)
            else:
                self._fetched[want] = data
                self._missing.discard(want)
        if self._exchange:
            self._exchange.refresh()
        if self._missing:
            self._ask_more()
        else:
            self._done()

    def _read_manifest(self, uid: int) -> None:
        data = self._manifest_data.tobytes()
        try:
            if digest_of(data) != self._digest:
                raise WireError("its hash is wrong")
            self._manifest = unpack_manifest(data)
            if self._exchange:
                self._exchange.refresh()
        except WireError:
            self._manifest = None
            self._distrust(uid)
            if self._holders:
                assert self._truth is not None
                self.agreed(self._truth)
            return
        self._plan()

    def _distrust(self, uid: int) -> None:
        """A holder has sent something wrong: do without it, if there are others."""
        self._wrong.add(uid)
        if uid in self._holders:
            self._holders.remove(uid)
            if not self._holders:
                self.engine.fail(self, f"what {self._names[uid]} sent is not what it had hashed: does it write to its state meanwhile?")

    # --- the end ----------------------------------------------------------------------------------------------------

    def _done(self) -> None:
        self._complete = True
        self.engine.executor.flush()
        self.engine.moved(self)

    def is_complete(self) -> bool:
        """Whether everything that differed is here, or nothing did."""
        return self._complete

    def halt(self) -> None:
        """The attempt is over; what was fetched and checked stays."""
        self._close()
        self._landing.clear()
        self._complete = False

    def _close(self) -> None:
        """Close the exchange of this attempt."""
        if self._exchange:
            self._moved[0] += self._exchange.bytes_sent
            self._moved[1] += self._exchange.bytes_received
            self._exchange = None
        self.engine.stop(self)

    def result(self, outcome: Outcome, record: Record) -> StateInfo:
        """Everyone has the truth: swap it in."""
        truth = self._truth
        assert truth is not None
        self._close()
        state = dict(self.snapshot.given)
        if self._manifest is not None:
            touched: set[str] = set()
            for want, data in self._fetched.items():
                item = self._manifest.items[want.item]
                if want.item not in self._new_bytes:
                    self.snapshot.block(item.name, want.block)[:] = data
                    touched.add(item.name)
            for name in touched:
                self.snapshot.finish(name)
            for i, memory in self._new_on_gpu.items():
                memory.unpack(self._new_bytes[i].view(memory.dtype.numpy))
            state.update({item.name: item.content for item in self._manifest.items if not item.dtype})
            state.update(self._new)
        membership = self.engine.membership(self.comm)
        membership.synced = membership.took_part = truth.sync
        return StateInfo(
            truth.revision,
            truth.digest.hex(),
            self._moved[0],
            self._moved[1],
            tuple(self._sources.values()),
            self.engine.now() - self.began,
            record.attempts,
            state,
        )

    def _mismatch(self, flow: Flow) -> None:
        self.engine.mismatched(self, flow.uid)


def _kind(item: Item) -> str:
    return f"a {item.dtype} tensor of shape {item.shape}" if item.dtype else "a value"
