"""Every schedule is proved for every small world, and run on numbers; and the proof is shown to find what is wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pccl.collectives.schedules import COLLECTIVES, ROOTED, algorithms, build, find, meaning, natural_cuts
from pccl.collectives.schedules.steps import Program, program, rows
from pccl.collectives.verify import ScheduleError, interpret, verify
from pccl.core.errors import InvalidArgument
from pccl.core.step import Action, Schedule
from pccl.topology import trees

ALL = [(collective, algorithm) for collective in COLLECTIVES for algorithm in algorithms(collective)]
ORDERED = [name for name in ALL if find(*name).ordered]
ROTATING = {"ring", "bidirectional_ring", "doubling", "direct"}
every = pytest.mark.parametrize(("collective", "algorithm"), ALL)


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """Proofs make many small objects and no cycles: looking for some takes half of the time."""
    gc.disable()
    yield
    gc.enable()


def random_links(world: int, seed: int) -> np.ndarray:
    """A connected graph in which many pairs have no link."""
    random = np.random.default_rng(seed)
    made = np.triu(random.random((world, world)) < 0.2, 1)
    for node in range(1, world):
        made[random.integers(node), node] = True
    return made | made.T


def make(collective: str, algorithm: str, world: int, *, root: int | None = None, waves: int = 1, **more) -> Schedule:
    """A schedule with what the algorithm needs."""
    if collective in ROOTED:
        more["root"] = world // 3 if root is None else root
    if find(collective, algorithm).tree:
        more["parents"] = trees.spanning_tree(random_links(world, world))
    hosts = more.setdefault("hosts", random_hosts(world, world)) if find(collective, algorithm).levels else None
    return build(collective, algorithm, world, cuts=waves * natural_cuts(collective, algorithm, world, hosts), **more)


def random_hosts(world: int, seed: int) -> tuple[int, ...]:
    """Some hosts with one member, some with many, in any order."""
    random = np.random.default_rng(seed)
    return tuple(random.integers(1 + random.integers(world), size=world).tolist())


def worlds(collective: str, algorithm: str, candidates) -> list[int]:
    return [world for world in candidates if find(collective, algorithm).fits(world)]


def loads(collective: str, algorithm: str) -> list[tuple[int, int]]:
    """(slices, window) at and below what a schedule must bear."""
    return [(2, 4), (1, 2)] if find(collective, algorithm).cyclic else [(3, 2), (1, 2)]


# --- proofs -------------------------------------------------------------------------------------------------------------


@every
def test_small_worlds(collective, algorithm):
    for world in worlds(collective, algorithm, range(1, 10)):
        for slices, window in loads(collective, algorithm):
            for root in {0, world // 2, world - 1} if collective in ROOTED else {None}:
                for waves in (1, 2):
                    schedule = make(collective, algorithm, world, root=root, waves=waves)
                    verify(schedule, slices=slices, window=window, timings=("eager", "lazy", 1, 2))


@every
def test_every_world_to_33(collective, algorithm):
    window = 4 if find(collective, algorithm).cyclic else 2
    for world in worlds(collective, algorithm, range(10, 34)):
        verify(make(collective, algorithm, world), slices=2, window=window, timings=("lazy",) if world % 2 else ("eager",))


@every
@pytest.mark.parametrize("world", [64, 128])
def test_large_worlds(collective, algorithm, world):
    if not find(collective, algorithm).fits(world) or (collective, algorithm, world) == ("all_to_all", "ring", 128):
        pytest.skip("does not work there, or would take seconds")
    for root in {0, world - 1} if collective in ROOTED else {None}:
        verify(make(collective, algorithm, world, root=root), timings=("lazy",))


@every
def test_parts_of_different_sizes(collective, algorithm):
    """The first parts have a slice more than the others, or the others are empty."""
    most, window = loads(collective, algorithm)[0]
    for world in worlds(collective, algorithm, (2, 5, 8)):
        schedule = make(collective, algorithm, world, waves=3)
        for longer in {0, 1, 3, schedule.cuts // 2, schedule.cuts - 1, schedule.cuts}:
            verify(schedule, slices=[most - (cut >= longer) for cut in range(schedule.cuts)], window=window, timings=("lazy",))
            verify(schedule, slices=[int(cut < longer) for cut in range(schedule.cuts)], window=window, timings=("eager",))


@every
def test_what_does_not_go_round_works_with_any_window(collective, algorithm):
    if find(collective, algorithm).cyclic:
        pytest.skip("has a bound of its own")
    for world in worlds(collective, algorithm, (2, 3, 7, 8)):
        verify(make(collective, algorithm, world), slices=5, window=1)


@pytest.mark.parametrize("collective", ["reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("window", [2, 3, 6])
def test_the_bound_of_cyclic_schedules_is_sharp(collective, window):
    assert find(collective, "ring").cyclic
    for world in (4, 7):
        for waves in (1, 3):
            schedule = make(collective, "ring", world, waves=waves)
            verify(schedule, slices=window - 1, window=window)
            with pytest.raises(ScheduleError, match=f"deadlock: rank .* waits for room in a window of {window}"):
                verify(schedule, slices=window, window=window)


@every
def test_rotation_is_declared_where_it_holds(collective, algorithm):
    for world in worlds(collective, algorithm, (2, 6, 8)):
        schedule = make(collective, algorithm, world)
        assert schedule.rotates == (algorithm in ROTATING and collective not in ROOTED and collective != "sendrecv")


@given(st.sampled_from(ORDERED), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=60)
def test_any_order_of_the_ranks(name, world, data):
    if not find(*name).fits(world):
        world = 8
    order = data.draw(st.permutations(range(world)))
    root = data.draw(st.integers(0, world - 1))
    schedule = make(*name, world, root=root, order=order)
    slices, window = loads(*name)[0]
    verify(schedule, slices=slices, window=window)
    if name[1] == "ring" and name[0] not in ROOTED:
        place = {rank: i for i, rank in enumerate(order)}
        for rank in range(world):
            peers = schedule.steps(rank)["peer"]
            assert all((place[rank] - place[peer]) % world in (1, world - 1) for peer in peers[peers >= 0].tolist())


@given(st.sampled_from([name for name in ALL if find(*name).tree]), st.integers(1, 24), st.integers(0, 1000), st.data())
@settings(deadline=None, max_examples=60)
def test_any_tree(name, world, seed, data):
    links = random_links(world, seed)
    parents = trees.spanning_tree(links)
    root = data.draw(st.integers(0, world - 1)) if name[0] in ROOTED else -1
    schedule = build(*name, world, root=root, parents=parents)
    verify(schedule, slices=3, window=2)
    for rank in range(world):
        peers = schedule.steps(rank)["peer"]
        assert all(links[rank, peer] for peer in peers[peers >= 0])


PARTITIONS = st.integers(1, 16).flatmap(lambda world: st.lists(st.integers(0, world - 1), min_size=world, max_size=world))


@given(st.sampled_from([name[0] for name in ALL if find(*name).levels]), PARTITIONS, st.booleans(), st.data())
@settings(deadline=None, max_examples=150)
def test_any_distribution_over_hosts(collective, hosts, one, data):
    world = len(hosts)
    root = data.draw(st.integers(0, world - 1)) if collective in ROOTED else -1
    schedule = build(collective, "hierarchical", world, root=root, hosts=hosts, cuts=int(one and collective == "all_reduce"))
    verify(schedule, slices=3, window=1, timings=("eager", "lazy", 1, 2))


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 0, 1, 2, 2], [0, 0, 0, 1], [0, 0, 1, 1, 2], [2, 1, 0], [0] * 7 + [1] * 8 + [2]])
def test_between_hosts_no_more_moves_than_if_each_had_one_member(hosts):
    world, h, where = len(hosts), len(set(hosts)), np.array(hosts)

    def crossing(collective: str, **more) -> tuple[np.ndarray, np.ndarray]:
        """Segments that leave and enter each host, and that each rank sends to other hosts."""
        schedule = build(collective, "hierarchical", world, hosts=hosts, **more)
        out, into, by = np.zeros(h), np.zeros(h), np.zeros(world)
        for rank in range(world):
            for step in schedule.steps(rank):
                if step["action"] == Action.SEND and where[rank] != where[step["peer"]]:
                    size = step["blocks"] / schedule.cuts
                    out[where[rank]] += size
                    into[where[step["peer"]]] += size
                    by[rank] += size
        return out, into, by

    out, into, by = crossing("all_reduce")
    np.testing.assert_allclose([out, into], np.full((2, h), 2 * (h - 1) / h))
    for host in range(h):
        share = by[where == host]
        assert share.max() - share.min() <= 2 / (h * -(-world // h)) + 1e-9, "one block more, at most, there and back"
    members = np.bincount(hosts)
    out, _, _ = crossing("reduce_scatter")
    np.testing.assert_array_equal(out, world - members)
    _, into, _ = crossing("all_gather")
    np.testing.assert_array_equal(into, world - members)
    out, into, _ = crossing("broadcast", root=world - 1)
    np.testing.assert_allclose(into, np.arange(h) != hosts[-1])
    assert out.max() <= 1 + 1e-9


# --- numbers ------------------------------------------------------------------------------------------------------------


def numbers(schedule: Schedule, count: int, dtype: str, seed: int = 0) -> list[np.ndarray | None]:
    """What each rank gives."""
    random = np.random.default_rng(seed)
    segments = meaning.segments(schedule.collective, schedule.world).source
    return [
        random.integers(-99, 99, count * segments).astype(dtype) if meaning.has_input(schedule.collective, rank, schedule.root) else None
        for rank in range(schedule.world)
    ]


def expected(schedule: Schedule, inputs: list[np.ndarray | None], rank: int) -> np.ndarray | None:
    """What a rank is to get, said in another way than `meaning` says it."""
    world, root = schedule.world, schedule.root
    given = [array for array in inputs if array is not None]
    mine = lambda array: np.split(array, world)[rank]  # noqa: E731
    match schedule.collective:
        case "all_reduce":
            return sum(given)
        case "reduce":
            return sum(given) if rank == root else None
        case "reduce_scatter":
            return mine(sum(given))
        case "all_gather":
            return np.concatenate(given)
        case "gather":
            return np.concatenate(given) if rank == root else None
        case "broadcast":
            return given[0]
        case "scatter":
            return mine(given[0])
        case "all_to_all":
            return np.concatenate([mine(array) for array in given])
    return given[0] if rank == 1 else None


@every
@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_of_any_length(collective, algorithm, in_place):
    for world in worlds(collective, algorithm, (1, 2, 3, 5, 8)):
        for waves, count in [(1, 0), (1, 1), (1, world - 1), (1, world), (2, world + 1), (3, 1025)]:
            schedule = make(collective, algorithm, world, waves=waves)
            inputs = numbers(schedule, count, "int64")
            before = [None if array is None else array.copy() for array in inputs]
            outputs = interpret(schedule, inputs, np.add, in_place)
            for rank, output in enumerate(outputs):
                np.testing.assert_array_equal(output, expected(schedule, inputs, rank))
            for array, was in zip(inputs, before, strict=True):
                np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize("algorithm", algorithms("all_reduce"))
def test_floats_have_the_same_bits_everywhere_and_averages_divide_once(algorithm):
    for world in (3, 8, 11):
        schedule = make("all_reduce", algorithm, world)
        inputs = [np.random.default_rng(rank).normal(size=101).astype("float32") for rank in range(world)]
        sums = interpret(schedule, inputs)
        means = interpret(schedule, inputs, finish=lambda array, world=world: array / world)
        assert len({array.tobytes() for array in sums}) == 1
        np.testing.assert_array_equal(means[0], sums[0] / np.float32(world))
        np.testing.assert_allclose(means[0], np.mean(inputs, axis=0), rtol=1e-4, atol=1e-6)


def test_direct_and_star_fold_in_rank_order_whoever_folds():
    world = 7
    inputs = [np.random.default_rng(rank).normal(size=50).astype("float32") for rank in range(world)]
    in_order = reduce(np.add, inputs)
    for hub in range(world):
        for collective in ("all_reduce", "reduce"):
            np.testing.assert_array_equal(interpret(build(collective, "star", world, root=hub), inputs)[hub], in_order)
    for cuts in (1, world, 2 * world):
        np.testing.assert_array_equal(interpret(build("all_reduce", "direct", world, cuts=cuts), inputs)[3], in_order)
    whole = np.stack([np.tile(array, world) for array in inputs])
    np.testing.assert_array_equal(interpret(build("reduce_scatter", "direct", world), list(whole))[3], in_order)


@every
def test_a_world_of_one_only_copies(collective, algorithm):
    if collective != "sendrecv":
        actions = make(collective, algorithm, 1, waves=2).steps(0)["action"]
        assert set(actions.tolist()) == {Action.COPY}


def test_ten_thousand_ranks_are_cheap():
    world = 10_000
    for collective, algorithm in ALL:
        if (collective, algorithm) == ("all_to_all", "ring") or not find(collective, algorithm).fits(world):
            continue
        more = {"parents": trees.binomial(world)} if find(collective, algorithm).tree else {}
        schedule = build(collective, algorithm, world, root=7 if collective in ROOTED else -1, **more)
        assert 1 <= len(schedule.steps(4711)) <= 8 * world


def test_trees_take_few_steps_and_load_nobody_much():
    for world in (100, 128):
        schedule = build("all_reduce", "tree", world)
        sent = [np.count_nonzero(schedule.steps(rank)["action"] == Action.SEND) for rank in range(world)]
        assert max(sent) <= 4, "halves: one up as a leaf, one up and two down as an interior node"
        broadcast = build("broadcast", "tree", world, root=5)
        sent = [np.count_nonzero(broadcast.steps(rank)["action"] == Action.SEND) for rank in range(world)]
        assert max(sent) <= 2, "halves: nobody sends more than it gets"


# --- the registry -------------------------------------------------------------------------------------------------------


def test_equal_arguments_give_the_same_schedule():
    assert build("all_reduce", "ring", 4, order=[2, 1, 0, 3]) is build("all_reduce", "ring", 4, order=np.array([2, 1, 0, 3]))
    assert build("reduce_scatter", "ring", 4, cuts=3).cuts == 3
    assert build("all_reduce", "direct", 4, cuts=1).cuts == 1
    assert [natural_cuts("all_reduce", name, 6) for name in algorithms("all_reduce")] == [6, 12, 2, 1, 4, 6, 6, 1]
    assert natural_cuts("all_reduce", "hierarchical", 6, (0, 0, 1, 1, 1, 1)) == 6
    assert build("all_reduce", "hierarchical", 4, cuts=1, hosts=[0, 1, 0, 1]).cuts == 1


def test_algorithms_of_a_world():
    assert "halving" in algorithms("reduce_scatter", 8)
    assert "halving" not in algorithms("reduce_scatter", 6)
    assert algorithms("sendrecv", 3) == ()


@pytest.mark.parametrize(
    ("arguments", "more", "text"),
    [
        (("all_reduc", "ring", 4), {}, "no collective is called 'all_reduc'; there are all_reduce, reduce_scatter"),
        (("gather", "ring", 4), {"root": 0}, "no algorithm for gather is called 'ring'; there are direct, tree, spanning_tree"),
        (("all_reduce", "ring", 0), {}, "at least 1 rank"),
        (("reduce_scatter", "halving", 6), {}, "does not work in a world of 6; what does: hierarchical, direct, ring, spanning_tree"),
        (("sendrecv", "direct", 3), {}, "what does: nothing"),
        (("broadcast", "tree", 4), {}, "needs a root among the ranks 0..3, got -1"),
        (("broadcast", "tree", 4), {"root": 4}, "needs a root among the ranks 0..3, got 4"),
        (("all_reduce", "ring", 4), {"root": 1}, "has no root, got 1"),
        (("all_reduce", "star", 4), {"root": 4}, "root 4 is none"),
        (("all_reduce", "ring", 4), {"cuts": 6}, "takes multiples of 4 cuts, got 6"),
        (("all_reduce", "ring", 4), {"cuts": -4}, "takes multiples of 4 cuts, got -4"),
        (("all_reduce", "ring", 4), {"order": [0, 1, 2, 2]}, "each of them once"),
        (("all_reduce", "direct", 4), {"order": [0, 1, 3, 2]}, "takes no order"),
        (("all_reduce", "direct", 4), {"order": [0, 1, 3, 2], "cuts": 1}, "takes no order"),
        (("all_reduce", "ring", 4), {"parents": [-1, 0, 0, 0]}, "takes no parents"),
        (("all_reduce", "ring", 4), {"hosts": [0, 0, 1, 1]}, "takes no hosts"),
        (("all_reduce", "hierarchical", 4), {"hosts": [0, 0, 1]}, "needs the hosts of 4 ranks, got 3"),
        (("all_reduce", "hierarchical", 4), {"root": 1}, "has no root, got 1"),
        (("all_reduce", "spanning_tree", 4), {}, "needs the parents of 4 ranks, got 0"),
        (("all_reduce", "spanning_tree", 4), {"parents": [-1, 0, 3, 2]}, "lead in a circle"),
    ],
)
def test_what_cannot_be_built(arguments, more, text):
    with pytest.raises(InvalidArgument, match=text):
        build(*arguments, **more)


def test_interpret_wants_whole_segments():
    with pytest.raises(InvalidArgument, match="in 3 segments"):
        interpret(build("reduce_scatter", "ring", 3), [np.zeros(4)] * 3)


# --- planted faults -----------------------------------------------------------------------------------------------------


def tampered(schedule: Schedule, rank: int, change: Callable[[Program], Program]) -> Schedule:
    """The schedule with one rank's program changed."""
    return replace(schedule, steps=lambda r: change(schedule.steps(r).copy()) if r == rank else schedule.steps(r), rotates=False)


def without(step: int) -> Callable[[Program], Program]:
    return lambda steps: np.delete(steps, step)


def swapped(one: int, other: int) -> Callable[[Program], Program]:
    def change(steps: Program) -> Program:
        steps[[one, other]] = steps[[other, one]]
        return steps

    return change


def having(step: int, **fields) -> Callable[[Program], Program]:
    def change(steps: Program) -> Program:
        for field, value in fields.items():
            steps[field][step] = value
        return steps

    return change


RING = build("all_reduce", "ring", 4)  # SEND, REDUCE three times, then SEND, RECEIVE three times
ONE_SHOT = build("all_reduce", "direct", 3, cuts=1)  # SEND, SEND, RECEIVE, RECEIVE, FOLD
GATHER = build("all_gather", "ring", 4)  # COPY, then SEND, RECEIVE three times
DIRECT = build("all_gather", "direct", 3)  # COPY, SEND, SEND, RECEIVE, RECEIVE

FAULTS = {
    "a send is missing": (RING, 2, without(4), "rank 2, step 5: SEND block 2 .* expects another part: rank 3, step 5: REDUCE block 3"),
    "a receive is missing": (RING, 2, without(11), "rank 1 sends 12 slices to rank 2 .* receives 10; one too many: rank 1, step 10"),
    "a copy is missing": (GATHER, 1, without(0), "rank 1: no step writes output part 1"),
    "a fold is missing": (ONE_SHOT, 1, without(4), "ends in scratch that nothing uses"),
    "sends are swapped": (RING, 0, swapped(6, 8), "rank 0, step 6: SEND block 3 .* expects another part"),
    "sends of one size are swapped": (GATHER, 0, swapped(1, 3), "reads a block that holds nothing"),
    "a send comes before what it passes on": (RING, 2, swapped(1, 2), "rank 2: output part .* is not what|not marked|missing"),
    "another block is sent": (DIRECT, 2, having(1, block=0), "reads a block that holds nothing"),
    "another block is received": (DIRECT, 2, having(3, block=0), "no step writes output part 1"),
    "another channel": (RING, 2, having(6, channel=1), "rank 2, step 8: SEND block 1 .* expects another part"),
    "another peer": (RING, 2, having(6, peer=1), "rank 2, step 8: SEND block 1 .* expects another part"),
    "final is missing": (RING, 2, having(5, final=False), "rank 2, step 5: REDUCE block 2 .* not marked as final"),
    "final is missing from a fold": (ONE_SHOT, 2, having(4, final=False), "rank 2, step 4: FOLD .* not marked as final"),
    "final comes too early": (RING, 2, having(3, final=True), "rank 2, step 3: REDUCE .* marked as final, but contributions"),
    "final on a receive": (RING, 2, having(7, final=True), "rank 2, step 7: is marked as final, but combines nothing"),
    "replaced instead of reduced": (RING, 2, having(1, action=Action.RECEIVE), "marked as final, but contributions are missing"),
    "a contribution is left out": (ONE_SHOT, 1, having(4, blocks=2), "contributions are missing|nothing uses"),
    "no such action": (RING, 0, having(0, action=9), "rank 0, step 0: there is no action 9"),
    "no such block": (RING, 0, having(0, block=4), "rank 0, step 0: blocks 4 to 4 are not within the 4 blocks"),
    "sends to itself": (RING, 1, having(0, peer=1), "rank 1, step 0: peer 1 is no other rank"),
    "a copy with a peer": (GATHER, 1, having(0, peer=0), "names a peer"),
    "a copy of nothing": (DIRECT, 1, having(0, block=0), "needs a source and a target"),
    "into without a fold": (RING, 1, having(0, into=2), "into is 2"),
    "folds into itself": (ONE_SHOT, 1, having(4, into=1), "folds into block 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault):
    schedule, rank, change, text = FAULTS[fault]
    verify(schedule)
    with pytest.raises(ScheduleError, match=text):
        verify(tampered(schedule, rank, change), slices=2, window=2)


def test_a_contribution_is_added_twice():
    """Rank 2 sends rank 0 what it got from rank 1, in place of its own."""
    forged = program(
        rows(Action.RECEIVE, [1, 0], peer=np.array([1, 0])),
        rows(Action.SEND, [2, 1], peer=np.array([1, 0])),
        rows(Action.FOLD, 0, blocks=3, into=3, final=True),
    )
    with pytest.raises(ScheduleError, match=r"rank 0, step 4: FOLD block 3 slice 0 adds the contribution of rank 1 a second time"):
        verify(tampered(ONE_SHOT, 2, lambda _: forged))


def handmade(collective: str, programs: list[Program], **more) -> Schedule:
    """A schedule of one cut, whose first blocks are what the ranks give; the last is the result everywhere (or at the root)."""
    world = len(programs)
    fields = {
        "blocks": world + 1,
        "source": lambda rank, block: np.where(block == rank, 0, -1),
        "target": lambda rank, block: np.where((block == world) & meaning.has_output(collective, rank, more.get("root", -1)), 0, -1),
    }
    return Schedule(collective, "handmade", world, 1, steps=programs.__getitem__, cut=np.zeros_like, **(fields | more))


@pytest.mark.parametrize("channel", [0, 1])
def test_flows_that_share_a_channel_deadlock(channel):
    """Rank 1 sends its own contribution and passes on rank 2's. Rank 0 needs both at once, and keeps the one until it has the other."""
    schedule = handmade(
        "reduce",
        [
            program(
                rows(Action.RECEIVE, 1, peer=1),
                rows(Action.RECEIVE, 2, peer=1, channel=channel),
                rows(Action.FOLD, 0, blocks=3, into=3, final=True),
            ),
            program(
                rows(Action.SEND, 1, peer=0),
                rows(Action.RECEIVE, 2, peer=2),
                rows(Action.SEND, 2, peer=0, channel=channel),
            ),
            rows(Action.SEND, 2, peer=1),
        ],
        root=0,
    )
    verify(schedule, slices=1, window=2)
    if channel == 1:
        verify(schedule, slices=3, window=2)
    else:
        with pytest.raises(ScheduleError, match=r"deadlock: rank 1, step 0: SEND block 1 slice 2 to rank 0 .* in a window of 2"):
            verify(schedule, slices=3, window=2)


def test_scratch_keeps_its_place_until_all_have_sent_it_on():
    """Rank 1 passes part 4 on twice; the first time it has to wait for part 5, which comes after it and finds no room."""
    programs = [
        program(
            rows(Action.COPY, 0, blocks=2),
            rows(Action.RECEIVE, 2, peer=1, blocks=2),
            rows(Action.RECEIVE, np.array([5, 4]), peer=1, channel=1),
            rows(Action.RECEIVE, 4, peer=1),
        ),
        program(
            rows(Action.SEND, 2, peer=0, blocks=2),
            rows(Action.RECEIVE, 4, peer=2, blocks=2),
            rows(Action.SEND, np.array([5, 4]), peer=0, channel=1),
            rows(Action.SEND, 4, peer=0),
        ),
        rows(Action.SEND, 4, peer=1, blocks=2),
    ]
    schedule = replace(
        build("gather", "direct", 3, root=0, cuts=2),
        steps=programs.__getitem__,
        blocks=6,
        cut=lambda block: block % 2,
        source=lambda rank, block: np.where(block // 2 == rank, block % 2, -1),
        target=lambda rank, block: np.where(rank == 0, block, -1),
    )
    verify(schedule, slices=1, window=2)
    with pytest.raises(ScheduleError, match=r"deadlock: rank 2, step 0: SEND block 5 slice 0 to rank 1 .* in a window of 2"):
        verify(schedule, slices=2, window=2)


def test_waiting_in_a_circle_is_a_deadlock():
    waits = [program(rows(Action.RECEIVE, 1 - rank, peer=1 - rank), rows(Action.SEND, rank, peer=1 - rank)) for rank in (0, 1)]
    fold = rows(Action.FOLD, 0, blocks=2, into=2, final=True)
    verify(handmade("all_reduce", [program(steps, fold) for steps in waits]))  # the ordering rule lets the sends go first

    def relay(rank: int) -> Program:
        return program(rows(Action.RECEIVE, 0, peer=1 - rank), rows(Action.SEND, 0, peer=1 - rank))

    circle = handmade("broadcast", [relay(0), relay(1)], root=0, blocks=1, target=lambda rank, block: block)
    with pytest.raises(ScheduleError, match=r"deadlock: .* never gets to run"):
        verify(circle)


def test_ranks_that_combine_in_different_orders():
    steps = [program(rows(Action.SEND, 0, peer=1 - rank), rows(Action.REDUCE, 0, peer=1 - rank, final=True)) for rank in (0, 1)]
    schedule = handmade("all_reduce", steps, blocks=1, source=lambda rank, block: block, target=lambda rank, block: block)
    with pytest.raises(ScheduleError, match="ranks 0 and 1 combine part 0 in different orders"):
        verify(schedule)


def test_a_write_that_races_with_a_send_of_the_same_memory():
    """What is sent and where the result grows are different blocks: nothing orders them, which matters in place only."""
    steps = [
        program(rows(Action.SEND, 0, peer=1), rows(Action.REDUCE, 1, peer=1, final=True)),
        program(rows(Action.SEND, 0, peer=0), rows(Action.REDUCE, 1, peer=0, final=True)),
    ]
    schedule = handmade(
        "all_reduce",
        steps,
        blocks=2,
        source=lambda rank, block: np.zeros_like(block),
        target=lambda rank, block: np.where(block == 1, 0, -1),
    )
    with pytest.raises(
        ScheduleError, match=r"in place, rank 0, step 1: REDUCE block 1 .* may overwrite .* yet to be read by rank 0, step 0: SEND block 0"
    ):
        verify(schedule)


def test_a_copy_after_its_home_was_overwritten():
    schedule = build("all_reduce", "star", 2, root=1)
    schedule = replace(schedule, source=lambda rank, block: np.where((block == rank) | (block == 2), 0, -1))
    verify(schedule)
    with pytest.raises(ScheduleError, match=r"rank 0, step 1: RECEIVE .* may overwrite .* yet to be read by rank 0, step 2: COPY"):
        verify(tampered(schedule, 0, lambda steps: program(steps, rows(Action.COPY, 2))))


@pytest.mark.parametrize(
    ("schedule", "changes", "text"),
    [
        (build("all_reduce", "tree", 4), {"rotates": True}, "not rank 0's, rotated"),
        (build("all_gather", "direct", 4), {"source": lambda rank, block: np.where(block == 0, 0, -1)}, "needs a source"),
        (DIRECT, {"source": lambda rank, block: np.where((block == rank) | (rank == 1) & (block == 2), 0, -1)}, "have other homes"),
        (build("all_gather", "direct", 4), {"target": lambda rank, block: block * 0}, "two blocks have the same target"),
        (build("all_gather", "direct", 4), {"target": lambda rank, block: block + 1}, "target part 4 is none of the 4"),
        (build("broadcast", "direct", 4, root=1), {"source": lambda rank, block: block}, "source part 0 is none of the 0"),
        (build("all_gather", "direct", 4), {"cut": lambda block: block}, "none of the 1 cuts"),
        (build("all_reduce", "direct", 4), {"steps": lambda rank: np.zeros(3, [("action", "i1")])}, "not an array of STEP"),
    ],
)
def test_wrong_claims(schedule, changes, text):
    with pytest.raises(ScheduleError, match=text):
        verify(replace(schedule, **changes))


def test_programs_that_use_blocks_differently_do_not_rotate():
    """Rank 1 copies its two blocks in the other order: nothing wrong with that, but it is not what rank 0 does."""
    schedule = build("all_gather", "direct", 3, cuts=2)

    def change(steps: Program) -> Program:
        steps["block"][[0, 5]] = steps["block"][[5, 0]]
        return steps

    forged = tampered(schedule, 1, change)
    verify(forged)
    with pytest.raises(ScheduleError, match="rank 1 uses its blocks in another way than rank 0"):
        verify(replace(forged, rotates=True))


def test_interpret_says_who_is_stuck():
    with pytest.raises(ScheduleError, match=r"rank 3 waits for a message|rank . waits for a message that is never sent"):
        interpret(tampered(RING, 2, without(4)), [np.ones(4)] * 4)
