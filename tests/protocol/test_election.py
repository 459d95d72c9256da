"""Which content sync_state takes for the truth."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.core.messages import Offer, Truth
from pccl.protocol.election import Conflict, elect


def offer(
    revision: int,
    digest: str,
    *,
    synced: int = 0,
    known: int | None = None,
    strategy: str = "elect",
    declare: bool = False,
    shape: str = "s",
) -> Offer:
    return Offer(revision, digest.encode(), shape.encode(), strategy, declare, 7, synced, synced if known is None else known)


def outcome(*offers: Offer) -> Truth | Conflict | dict[int, str]:
    return elect({uid: (o, "ABCDEFGH"[uid]) for uid, o in enumerate(offers)})


def truth(*offers: Offer) -> Truth:
    found = outcome(*offers)
    assert isinstance(found, Truth), found
    return found


def conflict(*offers: Offer) -> str:
    found = outcome(*offers)
    assert isinstance(found, Conflict), found
    return found.detail


def test_all_have_the_same() -> None:
    assert truth(offer(3, "x"), offer(3, "x")) == Truth(3, b"x", 7, (0, 1), 1)


def test_the_first_sync_takes_the_newest_revision_then_the_majority() -> None:
    found = truth(offer(5, "x"), offer(5, "y"), offer(5, "x"), offer(4, "y"), offer(4, "y"), offer(4, "y"))
    assert (found.revision, found.digest, found.holders) == (5, b"x", (0, 2))


def test_a_tie_is_a_conflict_that_names_both_sides() -> None:
    text = conflict(offer(5, "x"), offer(5, "y"))
    assert "revision 5" in text
    assert all(part in text for part in (b"x".hex(), b"y".hex(), "(A)", "(B)"))


def test_a_newcomer_only_receives() -> None:
    found = truth(offer(5, "x", synced=2), offer(5, "y", known=2), offer(5, "y", known=2))
    assert (found.digest, found.holders, found.sync) == (b"x", (0,), 3)


def test_a_newcomer_may_hold_what_is_true() -> None:
    assert truth(offer(5, "x", synced=2), offer(5, "x", known=2)).holders == (0, 1)


def test_what_is_true_counts_whatever_revision_it_is_called() -> None:
    assert truth(offer(5, "x", synced=2), offer(4, "x", synced=2)).holders == (0, 1)


def test_a_newcomer_that_is_ahead_has_to_go_unless_it_wants_to_receive() -> None:
    ahead = outcome(offer(5, "x", synced=2), offer(6, "y", known=2))
    assert isinstance(ahead, dict)
    assert ahead.keys() == {1}
    assert "revision 6 against 5" in ahead[1]
    assert truth(offer(5, "x", synced=2), offer(6, "y", known=2, strategy="receive")).digest == b"x"


def test_a_member_that_missed_a_sync_is_no_candidate() -> None:
    """It may be that it raised on it; what it has is older than what the others agreed on."""
    found = truth(offer(5, "x", synced=3), offer(5, "y", synced=2, known=3), offer(5, "y", synced=2, known=3))
    assert found.digest == b"x"


def test_the_last_holder_is_gone() -> None:
    assert "declare=True" in conflict(offer(5, "x", synced=1, known=3), offer(5, "x", known=3))
    found = truth(offer(5, "x", known=3, declare=True), offer(5, "y", known=3))
    assert (found.digest, found.sync) == (b"x", 4)


def test_a_declared_truth_beats_those_who_took_part() -> None:
    assert truth(offer(5, "x", synced=3), offer(5, "x", synced=3), offer(7, "y", known=3, declare=True)).digest == b"y"


def test_declarations_that_differ_are_a_conflict() -> None:
    assert "(B)" in conflict(offer(7, "x", declare=True), offer(8, "y", declare=True), offer(1, "z"))
    assert truth(offer(7, "x", declare=True), offer(7, "x", declare=True), offer(1, "z")).holders == (0, 1)


def test_a_declaration_behind_a_member_puts_that_one_out() -> None:
    found = outcome(offer(5, "x", synced=1), offer(3, "y", synced=1, declare=True))
    assert isinstance(found, dict)
    assert found.keys() == {0}


def test_senders_are_the_only_candidates() -> None:
    assert truth(offer(5, "x", synced=1), offer(5, "x", synced=1), offer(5, "y", synced=1, strategy="send")).digest == b"y"
    assert "differ" in conflict(offer(5, "x", strategy="send"), offer(5, "y", strategy="send"))


def test_a_newcomer_cannot_send() -> None:
    found = outcome(offer(5, "x", synced=1), offer(5, "y", known=1, strategy="send"))
    assert isinstance(found, dict)
    assert found.keys() == {1}
    assert "declare=True" in found[1]


def test_someone_has_to_send() -> None:
    assert "receive" in conflict(offer(5, "x", strategy="receive"), offer(5, "y", strategy="receive"))


def test_a_candidate_with_other_tensors_has_to_go() -> None:
    found = outcome(offer(5, "x", synced=1), offer(5, "x", synced=1), offer(5, "y", synced=1, shape="t"))
    assert isinstance(found, dict)
    assert found.keys() == {2}


@pytest.mark.parametrize("shape", ["s", "t"])
def test_a_newcomer_may_have_other_tensors_or_none(shape: str) -> None:
    assert truth(offer(5, "x", synced=1), offer(0, "", known=1, shape=shape)).holders == (0,)


OFFERS = st.builds(
    offer,
    st.integers(0, 2),
    st.sampled_from("xy"),
    synced=st.integers(0, 2),
    known=st.just(2),
    strategy=st.sampled_from(["elect", "elect", "receive", "send"]),
    declare=st.sampled_from([False, False, True]),
)


@given(st.dictionaries(st.integers(0, 5), OFFERS, min_size=1))
def test_the_truth_is_somebodys_and_in_nobodys_way(offers: Mapping[int, Offer]) -> None:
    found = elect({u: (o, str(u)) for u, o in offers.items()})
    if isinstance(found, Truth):
        holders = [offers[u] for u in found.holders]
        assert {o.digest for o in holders} == {found.digest}
        assert any(o.revision == found.revision for o in holders)
        assert any(o.declare or o.synced == 2 for o in holders)
        assert found.sync > max(o.known for o in offers.values())
        assert all(o.revision <= found.revision or o.digest == found.digest or o.strategy == "receive" for o in offers.values())
    elif isinstance(found, Conflict):
        assert found.detail
    else:
        assert found
        assert found.keys() <= offers.keys()
        assert len(found) < len(offers) or any(o.strategy == "send" for o in offers.values())
    order = elect({u: (offers[u], str(u)) for u in sorted(offers, reverse=True)})
    assert type(order) is type(found)
    if isinstance(found, Truth):
        assert isinstance(order, Truth)
        assert (order.digest, order.revision) == (found.digest, found.revision)
