"""What the builders build with: rows of steps, programs of rows, and the two ways to make a schedule from another one.

A builder writes the natural form of its algorithm: roles 0..world-1, a root in role 0, as few parts as it can do with. `relabel`
lets ranks play the roles, in any order and with any root; `repeat` runs it in waves over smaller parts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pccl.collectives.schedules import meaning
from pccl.core.step import STEP, Action, Ints, Schedule

Program = npt.NDArray[np.void]
"""An array of STEP."""


def rows(
    action: Action,
    block: Ints | int,
    *,
    peer: Ints | int = -1,
    channel: Ints | int = 0,
    blocks: Ints | int = 1,
    into: int = -1,
    final: npt.NDArray[np.bool_] | bool = False,
) -> Program:
    """Steps of one kind; arguments are broadcast against each other."""
    made = np.empty(np.broadcast(np.atleast_1d(block), peer, channel, blocks, final).shape, STEP)
    made["action"] = action
    made["final"] = final
    made["channel"] = channel
    made["peer"] = peer
    made["block"] = block
    made["blocks"] = blocks
    made["into"] = into
    return made


def program(*parts: Program) -> Program:
    """One after the other, without steps that have no blocks."""
    joined = np.concatenate(parts) if parts else np.empty(0, STEP)
    return joined[joined["blocks"] > 0]


def alternate(*parts: Program) -> Program:
    """The first of each, the second of each, and so on; all have the same length."""
    return np.stack(parts, axis=1).reshape(-1)


def last(count: int) -> npt.NDArray[np.bool_]:
    """True at the last of `count` places."""
    places: npt.NDArray[np.bool_] = np.arange(count) == count - 1
    return places


def where(condition: npt.NDArray[np.bool_], part: Ints | int) -> Ints:
    """The part where the condition holds, else -1."""
    return np.where(condition, part, -1)


def zero(blocks: Ints) -> Ints:
    """The cut of blocks that are whole segments."""
    return np.zeros(len(blocks), np.int64)


def repeat(base: Schedule, waves: int) -> Schedule:
    """The schedule run `waves` times over, wave by wave, each on its own cuts of every segment.

    Steps of different waves have no block in common, so waves overlap as far as the streams allow.
    """
    if waves == 1:
        return base
    cuts = base.cuts * waves

    def steps(rank: int) -> Program:
        once = base.steps(rank)
        shift = np.repeat(np.arange(waves) * base.blocks, len(once))
        made = np.tile(once, waves)
        made["block"] += shift
        made["into"] += np.where(made["into"] < 0, 0, shift)
        return made

    def part(of: Ints, block: Ints) -> Ints:
        wave = block // base.blocks
        return where(of >= 0, of // base.cuts * cuts + wave * base.cuts + of % base.cuts)

    return replace(
        base,
        cuts=cuts,
        blocks=base.blocks * waves,
        steps=steps,
        cut=lambda block: block // base.blocks * base.cuts + base.cut(block % base.blocks),
        source=lambda rank, block: part(base.source(rank, block % base.blocks), block),
        target=lambda rank, block: part(base.target(rank, block % base.blocks), block),
    )


def relabel(base: Schedule, order: Ints) -> Schedule:
    """The schedule with rank ``order[i]`` in role i. Segments that belong to ranks go with them."""
    world = base.world
    role = np.empty(world, np.int64)
    role[order] = np.arange(world)

    def steps(rank: int) -> Program:
        made = base.steps(int(role[rank])).copy()
        made["peer"] = where(made["peer"] >= 0, order[made["peer"]])
        return made

    def part(of: Ints, segments: int) -> Ints:
        if segments == 1:
            return of
        return where(of >= 0, order[of // base.cuts] * base.cuts + of % base.cuts)

    segments = meaning.segments(base.collective, world)
    return replace(
        base,
        steps=steps,
        source=lambda rank, block: part(base.source(int(role[rank]), block), segments.source),
        target=lambda rank, block: part(base.target(int(role[rank]), block), segments.target),
        root=int(order[base.root]) if base.root >= 0 else -1,
        rotates=base.rotates and bool(np.all((order - order[0] - np.arange(world)) % world == 0)),
    )
