"""What a new master learns from the reports of a group that it does not know (design 6, Takeover)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pccl.core import codec
from pccl.core.messages import CommReport, Report, SplitAsk
from pccl.core.types import Epoch, Member


class Rebuilt(NamedTuple):
    """One communicator, stopped, as its reports show it."""

    comm: int
    epoch: Epoch
    """The newest reported."""
    survivors: tuple[Member, ...]
    lost: tuple[Member, ...]
    left: tuple[Member, ...]
    """Members that report, but not this communicator: they closed it."""
    reports: dict[int, CommReport]
    newest: CommReport


def newest_epoch(reports: Iterable[Report], comm: int) -> CommReport | None:
    """The report of the highest epoch of a communicator."""
    return max((r for m in reports for r in m.comms if r.comm == comm), key=lambda r: r.epoch, default=None)


def rebuild(reports: Mapping[int, Report], root: int) -> list[Rebuilt]:
    """Every communicator that members of the newest epoch of `root` report, that one first."""
    newest = newest_epoch(reports.values(), root)
    if newest is None:
        return []
    present = {m.uid: reports[m.uid] for m in newest.members if m.uid in reports}
    return [_rebuild_one(present, comm) for comm in sorted({r.comm for m in present.values() for r in m.comms})]


def _rebuild_one(present: Mapping[int, Report], comm: int) -> Rebuilt:
    newest = newest_epoch(present.values(), comm)
    assert newest
    own: dict[int, CommReport] = {}
    left = []
    for member in newest.members:
        if member.uid not in present:
            continue
        known = {r.comm: r for r in present[member.uid].comms}
        if comm in known:
            own[member.uid] = known[comm]
        elif _awaits_split(present[member.uid]):
            own[member.uid] = newest._replace(next_index=0, tags=(), calls=())
        else:
            left.append(member)
    return Rebuilt(
        comm,
        newest.epoch,
        tuple(m for m in newest.members if m.uid in own),
        tuple(m for m in newest.members if m.uid not in present),
        tuple(left),
        own,
        newest,
    )


def _awaits_split(report: Report) -> bool:
    """Whether the member is done with a split whose commit it has not seen: it does not know the new communicators yet."""
    calls = (c for r in report.comms for c in r.calls)
    return any(c.state == "D" and c.payload and isinstance(codec.decode(c.payload), SplitAsk) for c in calls)
