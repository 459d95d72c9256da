"""A transfer whose slices travel quantized.

What goes to a peer is encoded when its turn comes, and decoded into the caller's memory when it is there; in between it lies in scratch, as
records. Nothing is encoded that does not travel, and what a member has encoded for others it takes from there itself: so all have the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pccl.collectives.flow import CallKey, Flow
from pccl.collectives.program import Layout, Program, Unit, Use
from pccl.collectives.quantize import Codec, Draw, block_of, is_coded, record_type
from pccl.collectives.supply import Supply
from pccl.collectives.transfer import Arithmetic, InStream, Transfer, TransferHost, Undo
from pccl.core.quantization import Quantization

Array = npt.NDArray[np.generic]


class CodedTransfer(Transfer):
    """A transfer whose layout counts records.

    Args:
        source, target: as for `Transfer`, of floats.
        arithmetic: of float32.
        count: elements per segment of source and target.
    """

    def __init__(
        self,
        host: TransferHost,
        key: CallKey,
        signature: int,
        prog: Program,
        lay: Layout,
        source: Array | None,
        target: Array | None,
        arithmetic: Arithmetic,
        flows: Mapping[int, Flow],
        *,
        undo: Undo | None,
        window: int,
        codec: Codec,
        quantization: Quantization,
        count: int,
        supply: Supply | None = None,
    ) -> None:
        wire = record_type(quantization)
        super().__init__(
            host, key, signature, prog, lay, source, target, arithmetic, flows, undo=undo, window=window, wire=wire, supply=supply
        )
        self._codec = codec
        self._quantization = quantization
        self._count = count

    def supplied(self, start: int, stop: int) -> None:
        """Nothing begins before all of the source is there: layouts count records, supplies elements."""
        if self._supply and self._supply.complete:
            self._supply = None
            for block in [block for block, where in enumerate(self.layout.source) if where >= 0]:
                for s in range(self.layout.slices[block]):
                    if not self.halted:
                        self._changed(block, s)
            self._check_done()

    def _is_supplied(self, block: int, s: int) -> bool:
        return False

    def lies_as_sent(self, use: Use) -> bool:
        """Unless it belongs into the caller's memory, and is of no more use here."""
        return not self._is_last(use)

    def readable_bytes(self, use: Use, s: int) -> memoryview:
        """The slice's records."""
        known = (use.block, s) in self._scratch
        records = self._records(use, s)
        if use.first and not known:
            self._codec.encode(self._quantization, records, self._content(use, s), self._draw(use, s, 0))
        return records.view(np.uint8).data

    def writable_bytes(self, use: Use, s: int) -> memoryview:
        """Where the slice's records go."""
        return self._records(use, s).view(np.uint8).data

    def _records(self, use: Use, s: int) -> Array:
        return self._scratch_for(use, s)[: self.slice_bytes(use.block, s)].view(self._dtype)

    def _extent(self, start: int, use: Use, s: int) -> tuple[int, int]:
        """Where the elements of a slice begin and end, of a block whose first record is this one."""
        block = block_of(self._quantization)
        segment, first = divmod(start + s * self.layout.slice_size, -(-self._count // block))
        stop = first + self.slice_bytes(use.block, s) // self._item
        begin = segment * self._count
        return begin + first * block, begin + min(stop * block, self._count)

    def _content(self, use: Use, s: int) -> Array:
        """The slice's present content: the caller's elements, or records."""
        if not use.first:
            return self._records(use, s)
        assert self._source is not None
        begin, end = self._extent(self.layout.source[use.block], use, s)
        return self._source[begin:end]

    def _fresh_home(self, use: Use, s: int) -> Array:
        """Where the slice's new content goes: records if it goes on from here, else the caller's elements."""
        return self._result(use, s) if self._is_last(use) else self._records(use, s)

    def _result(self, use: Use, s: int) -> Array:
        """The slice's place in the caller's memory, made ready to be overwritten."""
        assert self._target is not None
        begin, end = self._extent(self.layout.target[use.block], use, s)
        if self._undo:
            self._undo.save(begin * self._target.itemsize, end * self._target.itemsize)
        return self._target[begin:end]

    def _is_last(self, use: Use) -> bool:
        """Whether the block has a target and nobody uses it after this."""
        return self.layout.target[use.block] >= 0 and use.writes + 1 + use.reads == self.program.uses[use.block]

    def _start(self, use: Use) -> int:
        """A record of the whole with which the block begins."""
        return max(0, self.layout.source[use.block], self.layout.target[use.block])

    def _draw(self, use: Use, s: int, nth: int) -> Draw:
        """The chance by which this rank rounds a slice: the nth time, if it does so several times."""
        return Draw(self.program.rank, nth, self._start(use) + s * self.layout.slice_size)

    # --- progress ---------------------------------------------------------------------------------------------------

    def _assign(self, use: Use, s: int, content: Array) -> None:
        home = self._fresh_home(use, s)
        if is_coded(home) is is_coded(content):
            home[:] = content
        elif is_coded(home):
            self._codec.encode(self._quantization, home, content, self._draw(use, s, 1 + use.writes))
        else:
            self._codec.decode(self._quantization, home, content)

    def _combine(self, unit: Unit, s: int, came: Array) -> None:
        self._fold(unit, s, [self._content(unit.use, s), came])

    def _fold(self, unit: Unit, s: int, parts: list[Array]) -> None:
        use = unit.use
        begin, end = self._extent(self._start(use), use, s)
        draw = self._draw(use, s, 1 + use.writes)
        self._codec.fold(self._quantization, self._arithmetic, self._fresh_home(use, s), parts, unit.final, end - begin, draw)

    def _wrote(self, use: Use, s: int, stream: InStream | None = None, n: int = 0) -> None:
        block = use.block
        if self.layout.target[block] >= 0 and use.writes + 1 == self.program.writes[block] and not self._is_last(use):
            self._codec.decode(self._quantization, self._result(use, s), self._records(use, s))
        super()._wrote(use, s, stream, n)
