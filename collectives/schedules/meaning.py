"""What each collective means: who has input and output, of how many segments, and what every output part is to hold."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pccl.core.errors import InvalidArgument
from pccl.core.step import Ints

COLLECTIVES = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "sendrecv",
)
"""Barrier is an all_reduce of one byte. `sendrecv` goes from rank 0 to rank 1 of a world of two."""

ROOTED = frozenset({"broadcast", "reduce", "gather", "scatter"})
REDUCING = frozenset({"all_reduce", "reduce_scatter", "reduce"})

_MANY_IN = frozenset({"reduce_scatter", "scatter", "all_to_all"})
_MANY_OUT = frozenset({"all_gather", "gather", "all_to_all"})


class Segments(NamedTuple):
    """Segments of `count` elements in an input and in an output; where there are several, segment k is to or from rank k."""

    source: int
    target: int


class Origin(NamedTuple):
    """Where an output part comes from."""

    rank: Ints
    """Whose input; -1: everyone's, reduced."""
    part: Ints
    """Which part of it."""


def check(collective: str) -> None:
    """Raise InvalidArgument unless there is such a collective."""
    if collective not in COLLECTIVES:
        raise InvalidArgument(f"no collective is called {collective!r}; there are {', '.join(COLLECTIVES)}")


def segments(collective: str, world: int) -> Segments:
    """How many segments the buffers of a collective have, on ranks that have them."""
    return Segments(world if collective in _MANY_IN else 1, world if collective in _MANY_OUT else 1)


def has_input(collective: str, rank: int, root: int) -> bool:
    """Whether a rank gives anything."""
    if collective == "sendrecv":
        return rank == 0
    return collective not in ("broadcast", "scatter") or rank == root


def has_output(collective: str, rank: int, root: int) -> bool:
    """Whether a rank gets anything."""
    if collective == "sendrecv":
        return rank == 1
    return collective not in ("reduce", "gather") or rank == root


def origin(collective: str, world: int, root: int, cuts: int, rank: int, parts: Ints) -> Origin:
    """What a rank's output parts are to hold."""
    segment, cut = parts // cuts, parts % cuts
    everyone = np.full(len(parts), -1)
    match collective:
        case "all_reduce" | "reduce":
            return Origin(everyone, parts)
        case "reduce_scatter":
            return Origin(everyone, rank * cuts + cut)
        case "broadcast":
            return Origin(np.full(len(parts), root), parts)
        case "scatter":
            return Origin(np.full(len(parts), root), rank * cuts + cut)
        case "all_gather" | "gather":
            return Origin(segment, cut)
        case "all_to_all":
            return Origin(segment, rank * cuts + cut)
    return Origin(np.zeros(len(parts), np.int64), parts)  # sendrecv


def in_place(collective: str, root: int, cuts: int, rank: int, parts: Ints) -> Ints:
    """Output parts of a rank -> the input parts in the same memory when it calls in place, or -1.

    Where one side has more segments than the other, the rank's own segment is shared. There is no all_to_all in place: its blocks
    change places in pairs, and which of the two sends comes first is not for the executor's ordering rule to say.
    """
    nothing = np.full(len(parts), -1)
    if not (has_input(collective, rank, root) and has_output(collective, rank, root)):
        return nothing
    match collective:
        case "all_reduce" | "reduce" | "broadcast":
            return parts
        case "reduce_scatter" | "scatter":
            return rank * cuts + parts
        case "all_gather" | "gather":
            return np.where(parts // cuts == rank, parts % cuts, -1)
    return nothing
