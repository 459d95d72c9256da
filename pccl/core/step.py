"""Schedules as data: which rank sends, receives, reduces and copies which block, and in which order.

A schedule moves *blocks*. The caller's buffer consists of segments of `count` elements (one for all_reduce; one per rank on the
many side of all_gather, reduce_scatter, gather, scatter and all_to_all); each segment is cut into `cuts` parts of nearly equal size
(`part_sizes`), and part ``segment * cuts + cut`` is what a block refers to. A block has one size everywhere, that of its cut. On a
rank it may have a source (the input part that it holds before the first step) and a target (the output part that it is to be in
after the last); without a target it is scratch.

Steps of one rank run as soon as their blocks allow, not in program order: a step waits for the earlier steps of its program that
write a block which it reads or writes, and, if it writes, also for those that read it. This holds slice by slice. Sends to one
(peer, channel) leave in program order, and are received from there in that order, which is why a frame needs no name beyond its
place in its stream.

Three readers use the same data: the executor, the verifier and the fabric emulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Action(IntEnum):
    """What a step does. SEND only reads its blocks; a FOLD uses them up, so that it waits for their readers, too."""

    SEND = 0
    """blocks -> peer"""
    RECEIVE = 1
    """peer -> blocks, replacing them"""
    REDUCE = 2
    """peer -> blocks, combined with what they hold: ``block = held op received``"""
    COPY = 3
    """the blocks' input -> the blocks' output; nothing where the call works in place"""
    FOLD = 4
    """``into = block[0] op block[1] op ...``, from left to right, rounded once; the blocks are not read again. In place, `into` may lie
    where the rank's own contribution lies."""


STEP = np.dtype(
    [
        ("action", np.int8),
        ("final", np.bool_),  # REDUCE and FOLD: every contribution is in after this step; avg divides here
        ("channel", np.int16),  # numbers the streams between two peers that must not wait for each other
        ("peer", np.int32),  # -1 for COPY and FOLD
        ("block", np.int64),  # the first
        ("blocks", np.int64),  # how many
        ("into", np.int64),  # FOLD: the block that gets the result; -1 otherwise
    ]
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One collective by one algorithm for one world size. `steps(rank)` is generated on demand, an array of STEP."""

    collective: str
    algorithm: str
    world: int
    cuts: int
    """Parts per segment."""
    blocks: int
    """Size of the space of block numbers."""
    steps: Callable[[int], npt.NDArray[np.void]]
    cut: Callable[[Ints], Ints]
    """Block numbers -> which cut of a segment, for their size."""
    source: Callable[[int, Ints], Ints]
    """(rank, block numbers) -> input part, or -1."""
    target: Callable[[int, Ints], Ints]
    """(rank, block numbers) -> output part, or -1."""
    root: int = -1
    """Of rooted collectives; the hub of a star all_reduce"""
    rotates: bool = False
    """Rank r's program is rank 0's with r added to the peers, modulo the world size, and the blocks renamed one to one; the blocks of a
    FOLD count as a set."""


def part_sizes(count: int, cuts: int) -> Ints:
    """Elements in each part of a segment of `count` elements: the first ``count % cuts`` parts have one more."""
    sizes = np.full(cuts, count // cuts, np.int64)
    sizes[: count % cuts] += 1
    return sizes
