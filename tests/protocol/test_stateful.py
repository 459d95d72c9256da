"""Any order of events on the real machines: a seeded adversary, and hypothesis, which also shortens what it finds.

After every event: one verdict per call among the members of an epoch, no caller told twice, no epoch given to two
memberships. In the end faults stop, and every call of every member that is left has to end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pccl.core.messages import Reason
from tests.protocol import test_models as without_rule
from tests.protocol.adversary import TEXTS, Adversary, Limits, adversary
from tests.protocol.cluster import Node
from tests.protocol.test_models import Plant, without

SEEDS = 400


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(8))
def test_no_seed_breaks_a_promise(part: int) -> None:
    for seed in range(part * SEEDS // 8, (part + 1) * SEEDS // 8):
        run = adversary(seed)
        try:
            run.run()
        except BaseException as e:
            e.add_note(f"replay: from tests.protocol.adversary import adversary; adversary({seed}).run(); {run.text=} {run.window=}")
            raise


@pytest.mark.parametrize("off", [without_rule.no_fence, without_rule.no_remember, without_rule.no_final])
def test_the_adversary_finds_a_rule_that_is_off(off: Plant) -> None:
    with without(off):
        for seed in range(1000):
            try:
                adversary(seed).run()
            except AssertionError:
                return
    raise AssertionError(f"{off.__name__}: not found")


class Protocol(RuleBasedStateMachine):
    """Hypothesis decides what happens next. A node is named by a number, modulo those to whom it can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Adversary

    @initialize(nodes=st.sampled_from(["AB", "ABC"]), text=st.sampled_from(TEXTS), window=st.integers(1, 3))
    def begin(self, nodes: str, text: str, window: int) -> None:
        self.run = Adversary(0, nodes=nodes, text=text, limits=Limits(), window=window)

    def pick(self, number: int, able: Callable[[Node], object]) -> Node | None:
        nodes = [n for n in self.run.cluster.nodes if able(n)]
        return nodes[number % len(nodes)] if nodes else None

    def others_live(self) -> bool:
        return sum(1 for n in self.run.cluster.nodes if n.alive and n.ended is None) > 1

    @rule(who=st.integers(0, 5), several=st.integers(1, 4))
    def master_hears(self, who: int, several: int) -> None:
        node = self.pick(who, lambda n: n.outbox)
        for _ in range(several if node else 0):
            self.run.cluster.to_master(node)

    @rule(who=st.integers(0, 5), several=st.integers(1, 4))
    def hears(self, who: int, several: int) -> None:
        node = self.pick(who, lambda n: n.alive and n.inbox)
        for _ in range(several if node else 0):
            self.run.cluster.to_node(node)

    @rule(who=st.integers(0, 5))
    def calls(self, who: int) -> None:
        if node := self.pick(who, self.run.may_call):
            self.run.call(node)

    @rule()
    def all_call(self) -> None:
        for node in self.run.cluster.nodes:
            if self.run.may_call(node):
                self.run.call(node)

    @rule(who=st.integers(0, 5))
    def is_done(self, who: int) -> None:
        ready = [(n, x) for n in self.run.cluster.nodes if n.member for x in n.moving if n.can_complete(x)]
        if ready:
            node, call = ready[who % len(ready)]
            node.complete(call)

    @rule()
    def everything_moves(self) -> None:
        self.run.cluster.run()

    @rule(seconds=st.sampled_from([0.02, 0.5, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.run.cluster.tick(seconds)

    @rule(who=st.integers(0, 5))
    def dies(self, who: int) -> None:
        if self.others_live() and (node := self.pick(who, lambda n: n.alive)):
            node.die()

    @rule(who=st.integers(0, 5))
    def is_found_gone(self, who: int) -> None:
        if node := self.pick(who, lambda n: n.over and n.conn is not None):
            self.run.cluster.notice(node)

    @rule(who=st.integers(0, 5))
    def freezes(self, who: int) -> None:
        if self.others_live() and (node := self.pick(who, lambda n: n.member and n.conn is not None)):
            self.run.cluster.notice(node)

    @rule(who=st.integers(0, 5))
    def connects_again(self, who: int) -> None:
        if node := self.pick(who, lambda n: n.alive and n.ended is None and n.conn is None):
            node.connect()

    @rule()
    def master_restarts(self) -> None:
        self.run.restart()

    @rule(who=st.integers(0, 5), reason=st.sampled_from([Reason.DEADLINE, Reason.CANCELLED]))
    def is_stopped(self, who: int, reason: Reason) -> None:
        calls = [(n, x) for n in self.run.cluster.nodes if n.member for x in self.run.made[n] if x.outcome is None and not x.record.expired]
        if calls:
            self.run.stop(*calls[who % len(calls)], reason)

    @rule(who=st.integers(0, 5))
    def leaves(self, who: int) -> None:
        run = self.run
        if node := self.pick(who, lambda n: run.may_call(n) and run.at_update(n)):
            run.leave(node)

    @rule(who=st.integers(0, 5))
    def complains(self, who: int) -> None:
        if node := self.pick(who, lambda n: n.member and len(n.peer.root.view.members) > 1):
            self.run.complain(node)

    @rule()
    def someone_connects(self) -> None:
        if "u" in self.run.text and self.run.joined < 2:
            self.run.join()

    @invariant()
    def promises(self) -> None:
        self.run.cluster.check()

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.settle()


def explore(examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            phases=phases,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_hypothesis_finds_no_broken_promise() -> None:
    explore(150)


def test_hypothesis_finds_a_rule_that_is_off() -> None:
    with without(without_rule.no_fence), pytest.raises(AssertionError):
        explore(400, (Phase.generate,))
