"""Which content sync_state takes for the truth (design 9).

Candidates are the members that took part in the communicator's last sync; in its first sync, everyone. Newcomers only receive. The newest
revision wins, and within it the content that most candidates have; a tie is a conflict, for nobody can say who is right. Three arguments
of a member bend that: ``strategy="receive"`` is never a candidate, ``strategy="send"`` makes the senders the only candidates, and
``declare=True`` states a new truth, whoever took part in what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from pccl.core.messages import Offer, Truth


class Conflict(NamedTuple):
    """There is no truth: the call fails for all."""

    detail: str


Offenders = dict[int, str]
"""uid -> why this member cannot follow the truth that the others have: it has to leave."""

Offers = Mapping[int, tuple[Offer, str]]
"""uid -> (offer, member's name)"""


def elect(offers: Offers) -> Truth | Conflict | Offenders:
    """The truth, or why there is none, or who stands in its way."""
    latest = max(o.synced for o, _ in offers.values())
    known = max(o.known for o, _ in offers.values())
    declared = {u: o for u, (o, _) in offers.items() if o.declare}
    if declared:
        candidates = declared
    else:
        if latest < known:
            return Conflict(
                "every member that took part in the last sync is gone, and with them the state; "
                "one member has to state a new truth: sync_state(..., declare=True)"
            )
        candidates = {u: o for u, (o, _) in offers.items() if o.synced == latest and o.strategy != "receive"}
        senders = {u: o for u, (o, _) in offers.items() if o.strategy == "send"}
        late = {
            u: "strategy='send' is for members of the last sync; a newcomer states a new truth with declare=True"
            for u, o in senders.items()
            if o.synced < latest
        }
        if late:
            return late
        candidates = senders or candidates
        if not candidates:
            return Conflict("every member that has the state asked for strategy='receive': nobody is left to send it")
    revision = max(o.revision for o in candidates.values())
    votes = Counter(o.digest for o in candidates.values() if o.revision == revision)
    stated = declared or any(o.strategy == "send" for o in candidates.values())
    if stated and len({(o.revision, o.digest) for o in candidates.values()}) > 1:
        return Conflict(f"members that state the truth differ: {_sides(offers, candidates)}")
    ranking = votes.most_common(2)
    if len(ranking) == 2 and ranking[0][1] == ranking[1][1]:
        return Conflict(f"no content has a majority: {_sides(offers, [u for u, o in candidates.items() if o.revision == revision])}")
    digest = ranking[0][0]
    truth = next(o for o in candidates.values() if o.digest == digest and o.revision == revision)
    offenders: Offenders = {}
    for uid, (o, _) in offers.items():
        if o.strategy == "receive" or o.digest == digest:
            continue
        if o.revision > revision:
            offenders[uid] = (
                f"its state is ahead: revision {o.revision} against {revision} of the group; "
                "connect with an older state, or call sync_state(..., strategy='receive')"
            )
        elif uid in candidates and o.shape != truth.shape:
            offenders[uid] = "its tensors have other names, dtypes or shapes than those of the majority"
    if offenders:
        return offenders
    holders = tuple(u for u, (o, _) in offers.items() if o.digest == digest)
    return Truth(revision, digest, truth.manifest_bytes, holders, known + 1)


def _sides(offers: Offers, uids: object) -> str:
    """Who has what, for the error."""
    sides: dict[tuple[int, bytes], list[str]] = {}
    for uid, (o, name) in offers.items():
        if uid in uids:  # type: ignore[operator]
            sides.setdefault((o.revision, o.digest), []).append(name)
    return " against ".join(f"revision {r} with hash {d.hex()[:12]} ({', '.join(names)})" for (r, d), names in sides.items())
