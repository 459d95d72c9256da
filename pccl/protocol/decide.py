"""What an epoch change decides about every call, from the survivors' reports. One rule serves a loss and a master's takeover.

In short: one commit that anyone saw commits for all; a call that every survivor is done with is committed; one that a survivor
ended for good is aborted for good; any other that someone started is aborted and may be retried. A call that one survivor has
passed and another has not begun fails for the latter when it gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from pccl.core.messages import CallReport, CommReport, Decision, Reason, TagUse
from pccl.core.types import CallId, Pair, Tag
from pccl.protocol.progress import Progress

Failure = tuple[int, str]
"""(Reason, detail) of a call that was ended before the epoch change."""


class Ruling(NamedTuple):
    """The outcome of `decide`."""

    decisions: tuple[Decision, ...]
    news: bool
    """A loss that no decision tells every survivor of: their next call has to."""
    floor: int
    """The first untagged index that no survivor has entered."""
    tags: tuple[TagUse, ...]
    """The most uses that any survivor has made of each tag."""


def decide(
    reports: Mapping[int, CommReport],
    *,
    verdicts: Mapping[CallId, str],
    failures: Mapping[CallId, Failure],
    cause: Failure,
    loss: bool,
    resolve: Callable[[CallId, Mapping[int, bytes]], bytes],
) -> Ruling:
    """Decide every call that not all members have collected.

    Args:
        reports: survivor's uid -> its report.
        verdicts: what the master has already said, "C" or "A" (nothing after a takeover); "A" also of a call that it ends hereby, unless
            a member has committed it.
        failures: why calls were ended, as far as known.
        cause: why the epoch changes.
        loss: whether members are lost or have left.
        resolve: gives the result of a call that is committed on the survivors' payloads alone.
    """
    seen = {uid: {c.call: c for c in r.calls} for uid, r in reports.items()}
    floor = max((r.next_index for r in reports.values()), default=0)
    progress = {uid: Progress.of(r.next_index, r.tags) for uid, r in reports.items()}
    uses = {uid: p.tagged for uid, p in progress.items()}

    def passed(uid: int, call: CallId) -> bool:
        return progress[uid].passed(call)

    decisions: list[Decision] = []
    told: set[int] = set()  # survivors that a failing call will tell of the loss
    for call in _ids(seen.values(), verdicts, reports, uses):
        mine = [uid for uid in reports if call.pair is None or uid in call.pair]
        if not mine:
            continue
        states = {uid: seen[uid].get(call) for uid in mine}
        decision = _rule(call, states, verdicts.get(call), failures.get(call, cause), resolve, functools.partial(passed, call=call))
        if decision is None:
            continue
        decisions.append(decision)
        if decision.verdict != "C":
            told.update(uid for uid in mine if not passed(uid, call) or _is(states[uid], "RD"))
    most: dict[tuple[Tag, Pair | None], int] = {}
    for table in uses.values():
        for name, n in table.items():
            most[name] = max(n, most.get(name, 0))
    tags = tuple(TagUse(tag, pair, n) for (tag, pair), n in most.items())
    return Ruling(tuple(decisions), loss and len(told) < len(reports), floor, tags)


def _rule(
    call: CallId,
    states: Mapping[int, CallReport | None],
    verdict: str | None,
    failure: Failure,
    resolve: Callable[[CallId, Mapping[int, bytes]], bytes],
    passed: Callable[[int], bool],
) -> Decision | None:
    """Decide one call; None where nobody needs to hear of it."""
    committed = next((s for s in states.values() if _is(s, "C")), None)
    if committed:
        return Decision(call, "C", committed.waiting, committed.admitted, committed.payload, Reason.NONE, "")
    if any(_is(s, "U") for s in states.values()):
        if any(_is(s, "RD") for s in states.values()):
            return Decision(call, "C", -1, False, b"", Reason.NONE, "")
        return None  # the others will skip it, too
    attempts = {s.number if s and s.state == "D" else -1 for s in states.values()}  # a result of an earlier attempt is none of this one
    if verdict == "C" or (verdict is None and len(attempts) == 1 and -1 not in attempts):
        payload = resolve(call, {uid: s.payload for uid, s in states.items() if s})
        return Decision(call, "C", -1, False, payload, Reason.NONE, "")
    ended = verdict == "A" or any(_is(s, "A") for s in states.values())
    started = any(_is(s, "RD") for s in states.values())
    gap = not started and any(passed(uid) for uid in states) and not all(passed(uid) for uid in states)
    if ended or gap:
        waiting = max((s.waiting for s in states.values() if s and _is(s, "A")), default=-1)
        return Decision(call, "A", waiting, False, b"", *failure)
    if started:
        # whoever ended it without a verdict (atomic=False) has no more data to give: then a retry could not end
        final = any(s is None and passed(uid) for uid, s in states.items())
        return Decision(call, "A" if final else "R", -1, False, b"", *failure)
    return None


def _is(report: CallReport | None, states: str) -> bool:
    return report is not None and report.state in states


def _ids(
    seen: Iterable[Mapping[CallId, CallReport]],
    verdicts: Mapping[CallId, str],
    reports: Mapping[int, CommReport],
    uses: Mapping[int, Mapping[tuple[Tag, Pair | None], int]],
) -> list[CallId]:
    """Every call that may need a decision, untagged ones in their order: reported, ruled on, or passed by some survivors only."""
    ids = dict.fromkeys(call for calls in seen for call in calls)
    ids.update(dict.fromkeys(verdicts))
    indices = [r.next_index for r in reports.values()]
    if indices:
        ids.update((CallId(None, n), None) for n in range(min(indices), max(indices)))
    for tag, pair in dict.fromkeys(name for table in uses.values() for name in table):
        counts = [uses[uid].get((tag, pair), 0) for uid in reports if pair is None or uid in pair]
        ids.update((CallId(tag, n, pair), None) for n in range(min(counts), max(counts)))
    named = {call: call.tag is not None or call.pair is not None for call in ids}
    return sorted(ids, key=lambda call: (named[call], 0 if named[call] else call.n))
