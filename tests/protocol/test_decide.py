"""What an epoch change decides: tables of reports, and what comes of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.core.messages import CallReport, CommReport, Reason, TagUse
from pccl.core.types import CallId, Epoch, Pair
from pccl.protocol.decide import Failure, Ruling, decide

LOSS: Failure = (Reason.LOSS, "C is lost")


def report(next_index: int, *calls: CallReport, tags: tuple[TagUse, ...] = ()) -> CommReport:
    return CommReport(0, Epoch(1, 1, 1), (), 1, next_index, tags, calls, (), 3, 0)


def call(n: int, state: str, number: int = 1, *, payload: bytes = b"", waiting: int = -1, admitted: bool = False) -> CallReport:
    return CallReport(CallId(None, n), state, number, waiting, admitted, payload)


def rule(
    *reports: CommReport,
    verdicts: Mapping[CallId, str] | None = None,
    failures: Mapping[CallId, Failure] | None = None,
    loss: bool = True,
) -> Ruling:
    return decide(
        dict(enumerate(reports)),
        verdicts=verdicts or {},
        failures=failures or {},
        cause=LOSS,
        loss=loss,
        resolve=lambda k, payloads: b"+".join(payloads[u] for u in sorted(payloads)),
    )


def of(ruling: Ruling) -> dict[int, str]:
    return {d.call.n: d.verdict for d in ruling.decisions}


# --- one call -------------------------------------------------------------------------------------------------------------

STATES: dict[str, CommReport] = {
    "-": report(0),
    "p": report(1),  # passed, and nothing to say of it
    "R": report(1, call(0, "R", 5)),
    "D": report(1, call(0, "D", 5)),
    "d": report(1, call(0, "D", 4)),  # of the attempt before
    "C": report(1, call(0, "C", 5)),
    "A": report(1, call(0, "A", 5)),
    "U": report(1, call(0, "U", 5)),
}

TABLE = {
    "--": "",
    "RR": "R",
    "R-": "R",
    "RD": "R",
    "DD": "C",
    "dd": "C",
    "Dd": "R",  # results of different attempts are results of different members
    "D-": "R",  # the other has given nothing
    "Rp": "A",  # the other has no more data to give
    "p-": "A",
    "pp": "",
    "Dp": "A",
    "C-": "C",
    "CD": "C",
    "Cd": "C",
    "CC": "C",
    "Cp": "C",
    "AA": "A",
    "A-": "A",
    "AR": "A",
    "AD": "A",
    "Ap": "A",
    "AC": "C",
    "U-": "",
    "UU": "",
    "UR": "C",
    "UD": "C",
    "Up": "",
}


@pytest.mark.parametrize("states", TABLE)
def test_two_survivors(states: str) -> None:
    for pair in (states, states[::-1]):
        assert of(rule(*(STATES[s] for s in pair))) == ({0: TABLE[states]} if TABLE[states] else {})


@pytest.mark.parametrize("states", ["RR", "RD", "Dd", "--", "DD", "AD", "AA", "p-"])
def test_what_the_master_has_said_stands(states: str) -> None:
    for verdict in "CA":
        assert of(rule(*(STATES[s] for s in states), verdicts={CallId(None, 0): verdict})) == {0: verdict}


def test_the_result_of_a_commit_comes_from_one_that_has_it_or_from_what_all_gave() -> None:
    (d,) = rule(report(1, call(0, "C", payload=b"made", waiting=1, admitted=True)), report(1, call(0, "D", payload=b"mine"))).decisions
    assert (d.payload, d.waiting, d.admitted) == (b"made", 1, True)
    (d,) = rule(report(1, call(0, "D", payload=b"mine")), report(1, call(0, "D", payload=b"yours"))).decisions
    assert (d.payload, d.waiting, d.admitted) == (b"mine+yours", -1, False)


def test_a_failure_keeps_its_reason() -> None:
    deadline: Failure = (Reason.DEADLINE, "too late")
    ruling = rule(
        report(3, call(0, "A", waiting=1), call(1, "A"), call(2, "R")),
        report(3, call(0, "D"), call(1, "D"), call(2, "R")),
        failures={CallId(None, 0): deadline},
    )
    assert [(d.verdict, d.reason, d.detail, d.waiting) for d in ruling.decisions] == [
        ("A", Reason.DEADLINE, "too late", 1),
        ("A", *LOSS, -1),
        ("R", *LOSS, -1),
    ]


def test_nobody_left_decides_nothing() -> None:
    assert rule() == Ruling((), False, 0, ())


# --- several calls --------------------------------------------------------------------------------------------------------


def test_an_idle_loss_is_told_by_the_next_call_that_nobody_has_entered() -> None:
    ruling = rule(report(4), report(4))
    assert ruling == Ruling((), True, 4, ())
    assert not rule(report(4), report(4), loss=False).news


def test_a_failing_call_that_all_meet_tells_them() -> None:
    assert not rule(report(5, call(4, "R")), report(4)).news
    assert not rule(report(5, call(4, "R")), report(5, call(4, "D"))).news


@pytest.mark.parametrize("ended", ["A", "C"])
def test_a_survivor_that_no_failing_call_meets_has_to_be_told(ended: str) -> None:
    """The first has ended call 4 already; only the second hears of the loss through it."""
    assert rule(report(5, call(4, ended)), report(4)).news


def test_shares_that_come_back() -> None:
    """Calls that some have passed and others have not begun: each fails for those who come to it later, and for nobody else."""
    ruling = rule(report(3), report(1), report(2))
    assert of(ruling) == {1: "A", 2: "A"}
    assert ruling.floor == 3
    assert ruling.news  # the first has passed all of them


def test_updates_that_one_has_skipped_are_skipped_by_all() -> None:
    ruling = rule(report(3, call(2, "U")), report(2))
    assert of(ruling) == {}
    assert (ruling.floor, ruling.news) == (3, True)


def test_tags_and_pairs_have_their_own_order() -> None:
    pair = Pair(0, 1)
    ruling = rule(
        report(0, CallReport(CallId("t", 1), "R", 1, -1, False, b""), tags=(TagUse("t", None, 2), TagUse(None, pair, 1))),
        report(0, tags=(TagUse("t", None, 1),)),
        report(0, tags=(TagUse("t", None, 1),)),
    )
    assert {d.call: d.verdict for d in ruling.decisions} == {CallId("t", 1): "R", CallId(None, 0, pair): "A"}
    assert set(ruling.tags) == {TagUse("t", None, 2), TagUse(None, pair, 1)}


def test_a_pair_is_not_asked_after_by_others() -> None:
    """Members 0 and 1 are done with what they sent each other; that 2 has never heard of it is no gap."""
    one = CallReport(CallId("t", 0, Pair(0, 1)), "D", 1, -1, False, b"")
    uses = (TagUse("t", Pair(0, 1), 1),)
    ruling = rule(report(0, one, tags=uses), report(0, one, tags=uses), report(0))
    assert {d.call: d.verdict for d in ruling.decisions} == {one.call: "C"}


def test_a_pair_whose_members_are_gone_is_nobodys() -> None:
    gone = CallId(None, 0, Pair(7, 8))
    assert rule(report(1), report(1), verdicts={gone: "A"}).decisions == ()


def test_untagged_decisions_come_in_their_order() -> None:
    ruling = rule(report(12, *(call(n, "R") for n in (11, 2, 10, 3))), report(12, *(call(n, "R") for n in (3, 11, 2, 10))))
    assert [d.call.n for d in ruling.decisions] == [2, 3, 10, 11]


@given(st.lists(st.lists(st.sampled_from("-pRDdCAU"), min_size=2, max_size=4).map(tuple), min_size=1, max_size=3))
def test_any_reports_give_one_verdict_that_no_survivor_contradicts(columns: list[tuple[str, ...]]) -> None:
    """One column per call; members that have not begun a call have begun none after it."""
    n = min(len(c) for c in columns)
    reports = []
    for u in range(n):
        states = list(itertools.takewhile(lambda s: s != "-", (c[u] for c in columns)))
        told = [call(i, s.upper(), 4 if s == "d" else 5) for i, s in enumerate(states) if s != "p"]
        reports.append(report(len(states), *told))
    ruling = rule(*reports)
    decided = of(ruling)
    assert len(decided) == len(ruling.decisions)
    met = set()
    for i in range(len(columns)):
        states = {u: next((x.state for x in r.calls if x.call.n == i), "p" if i < r.next_index else "-") for u, r in enumerate(reports)}
        verdict = decided.get(i)
        if "C" in states.values():
            assert verdict == "C"
        elif "A" in states.values():
            assert verdict == "A" or "U" in states.values()
        if verdict != "C":
            assert set(states.values()) != {"D"} or len({x.number for r in reports for x in r.calls if x.call.n == i}) > 1
        if verdict is None:
            assert not set(states.values()) & set("RDCA") or "U" in states.values()
        elif verdict != "C":
            met |= {u for u, s in states.items() if s in "RD-"}
    assert ruling.news == (len(met) < len(reports))
    assert ruling.floor == max(r.next_index for r in reports)
