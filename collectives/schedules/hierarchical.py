"""Two levels, hosts and their members: what the members of one host can do among themselves crosses no network.

Between hosts no more moves than if each had one member: in an all_reduce every host sends and receives 2 (h - 1) / h of the data, h
being the number of hosts, however many members it has (the lower bound of Patarasu, Yuan: see `ring`). The members of a host share
that out: for each block one of them speaks for all. With as many members on each host as on any other, an all_reduce is a
reduce-scatter within the hosts, a ring across them for each member, and an all-gather within the hosts, as NCCL and Horovod do it.
Any other distribution will do, too.

In what order ranks are added up depends on the hosts alone. All have a result from the one that finished it, or fold the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pccl.collectives.schedules.steps import Program, last, program, rows, where, zero
from pccl.core.step import Action, Ints, Schedule


class _Hosts:
    """Who is where.

    Attributes:
        host: rank -> host.
        line: all ranks, host by host.
        position: rank -> where in the line it is.
    """

    def __init__(self, hosts: Ints) -> None:
        self.world = len(hosts)
        self.host: Ints = np.unique(hosts, return_inverse=True)[1]
        self.line: Ints = np.argsort(self.host, kind="stable")
        self.position = np.argsort(self.line)
        self._sizes = np.bincount(self.host)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self.count = len(self._sizes)
        self.mean = -(-self.world // self.count)
        """Members of a host on average, rounded up"""

    def speaker(self, host: Ints | int, number: Ints | int) -> Ints:
        """Who speaks for a host, where something has this number: each of its members in turn."""
        host = np.asarray(host) % self.count
        found: Ints = self.line[self._starts[host] + number % self._sizes[host]]
        return found

    def others(self, rank: int) -> Ints:
        """The other members of a rank's host."""
        found: Ints = self.line[(self.host[self.line] == self.host[rank]) & (self.line != rank)]
        return found

    def abroad(self, rank: int, way: int) -> Ints:
        """Members of other hosts, of the next host first (`way` is 1) or of the one before (-1): so at no time all talk to the same."""
        distance = (self.host[self.line] - self.host[rank]) * way % self.count
        order = np.argsort(distance, kind="stable")
        found: Ints = self.line[order[distance[order] > 0]]
        return found


def _reduce_all(blocks: Ints, peers: Ints, *, final: bool, channel: Ints | int = 0) -> Program:
    """Each block from each peer, in their order."""
    channels = np.reshape(channel, (-1, 1))
    return rows(Action.REDUCE, blocks[:, None], peer=peers, channel=channels, final=last(len(peers)) & final).reshape(-1)


def _send_all(blocks: Ints, peers: Ints) -> Program:
    """Each block to each peer."""
    return rows(Action.SEND, blocks[:, None], peer=peers).reshape(-1)


def all_reduce(hosts: Ints) -> Schedule:
    """A host's members bring their contributions to a block together at the one who speaks for it, a ring across the hosts adds these
    up (see `ring.all_reduce`), and what comes round is passed on to all members.

    Every block has a home on every rank, so any window will do. There are as many blocks for each host to finish as a host has
    members, so that all members have work; together they are at most twice as many as ranks.
    """
    at = _Hosts(hosts)
    h = at.count

    def steps(rank: int) -> Program:
        if at.world == 1:
            return rows(Action.COPY, 0)
        mine, others = int(at.host[rank]), at.others(rank)
        turn = np.repeat(np.arange(h), at.mean)

        def round_the_hosts(action: Action, first: int) -> tuple[Program, Ints, Ints]:
            """What this rank passes on from host to host, beginning with blocks of the `first`; and its own and others' blocks."""
            blocks = (first - turn) % h * at.mean + np.arange(len(turn)) % at.mean
            own = at.speaker(mine, blocks) == rank
            out, into = own & (turn < h - 1), own & (turn > 0)
            moves = np.concatenate(
                [
                    rows(Action.SEND, blocks[out], peer=at.speaker(mine + 1, blocks[out])),
                    rows(
                        action,
                        blocks[into],
                        peer=at.speaker(mine - 1, blocks[into]),
                        final=(turn[into] == h - 1) & (action == Action.REDUCE),
                    ),
                ]
            )
            when = np.concatenate([2 * turn[out], 2 * turn[into] - 1])
            return moves[np.argsort(when, kind="stable")], blocks[own], blocks[~own]

        reducing, own, foreign = round_the_hosts(Action.REDUCE, mine - 1)
        gathering, done, to_come = round_the_hosts(Action.RECEIVE, mine)
        return program(
            rows(Action.SEND, foreign, peer=at.speaker(mine, foreign)),
            _reduce_all(own, others, final=h == 1),
            reducing,
            gathering,
            _send_all(done, others),
            rows(Action.RECEIVE, to_come, peer=at.speaker(mine, to_come)),
        )

    return _over_parts("all_reduce", at.world, h * at.mean, steps)


def one_exchange(hosts: Ints) -> Schedule:
    """One member of each host gets its members' contributions, all of these exchange what they have, and each folds for its host: a
    single hop across the network, for small messages. Block k is from host k, the last is the result.
    """
    at = _Hosts(hosts)
    h = at.count
    result = h if h > 1 else 0

    def steps(rank: int) -> Program:
        if at.world == 1:
            return rows(Action.COPY, 0)
        mine, others = int(at.host[rank]), at.others(rank)
        speaker = int(at.speaker(mine, 0))
        if rank != speaker:
            return program(rows(Action.SEND, mine, peer=speaker), rows(Action.RECEIVE, result, peer=speaker))
        distance = np.arange(1, h)
        return program(
            _reduce_all(np.array([mine]), others, final=h == 1),
            rows(Action.SEND, mine, peer=at.speaker(mine + distance, 0)),
            rows(Action.RECEIVE, (mine - distance) % h, peer=at.speaker(mine - distance, 0)),
            *([rows(Action.FOLD, 0, blocks=h, into=result, final=True)] if h > 1 else []),
            _send_all(np.array([result]), others),
        )

    return Schedule(
        "all_reduce",
        "hierarchical",
        at.world,
        cuts=1,
        blocks=h + 1,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == at.host[rank], 0),
        target=lambda rank, block: where(block == result, 0),
    )


def reduce_scatter(hosts: Ints) -> Schedule:
    """For each member of another host, one adds up what the members of this host give to it, and sends it there.

    No bound on slices, although these sums are scratch: within a host, what is for another one has a channel of its own, and all
    members send it in the same order. So the first unfinished slice of those for one host is at the head of every stream that it has
    yet to pass.
    """
    at = _Hosts(hosts)

    def steps(rank: int) -> Program:
        if at.world == 1:
            return rows(Action.COPY, 0)
        mine, others, abroad = int(at.host[rank]), at.others(rank), at.abroad(rank, 1)
        speakers = at.speaker(mine, at.position[abroad])
        own, foreign = abroad[speakers == rank], abroad[speakers != rank]
        givers = at.speaker(mine - np.arange(1, at.count), at.position[rank])
        return program(
            rows(Action.SEND, foreign, peer=speakers[speakers != rank], channel=at.host[foreign]),
            rows(Action.SEND, others, peer=others, channel=mine),
            _reduce_all(own, others, final=False, channel=at.host[own]),
            rows(Action.SEND, own, peer=own),
            _reduce_all(np.array([rank]), others, final=at.count == 1, channel=mine),
            _reduce_all(np.array([rank]), givers, final=True),
        )

    return _over_segments("reduce_scatter", at.world, steps)


def all_gather(hosts: Ints) -> Schedule:
    """Each segment goes once to every other host, where a member passes it on to the others."""
    at = _Hosts(hosts)

    def steps(rank: int) -> Program:
        mine, others, abroad = int(at.host[rank]), at.others(rank), at.abroad(rank, -1)
        speakers = at.speaker(mine, at.position[abroad])
        own, foreign = abroad[speakers == rank], abroad[speakers != rank]
        return program(
            rows(Action.COPY, rank),
            rows(Action.SEND, rank, peer=at.speaker(mine + np.arange(1, at.count), at.position[rank])),
            rows(Action.SEND, rank, peer=others),
            rows(Action.RECEIVE, others, peer=others),
            rows(Action.RECEIVE, own, peer=own),
            _send_all(own, others),
            rows(Action.RECEIVE, foreign, peer=speakers[speakers != rank]),
        )

    return _over_segments("all_gather", at.world, steps)


def broadcast(hosts: Ints, root: int) -> Schedule:
    """Each block goes from host to host, beginning at the root's, and on each host from its speaker to the others."""
    at = _Hosts(hosts)
    blocks = np.arange(at.mean)

    def steps(rank: int) -> Program:
        mine, others = int(at.host[rank]), at.others(rank)
        distance = int(mine - at.host[root]) % at.count
        speakers = at.speaker(mine, blocks)
        own, foreign = blocks[speakers == rank], blocks[speakers != rank]
        passed_on = program(
            rows(Action.SEND, own, peer=at.speaker(mine + 1, own), blocks=int(distance < at.count - 1)),
            _send_all(own, others[others != root]),
        )
        theirs = speakers[speakers != rank]
        if rank == root:
            return program(rows(Action.COPY, blocks), rows(Action.SEND, foreign, peer=theirs), passed_on)
        above = at.speaker(mine - 1, own) if distance else root
        return program(rows(Action.RECEIVE, own, peer=above), passed_on, rows(Action.RECEIVE, foreign, peer=theirs))

    return replace(
        _over_parts("broadcast", at.world, at.mean, steps),
        source=lambda rank, block: block if rank == root else np.full(len(block), -1),
        root=root,
    )


def _over_parts(collective: str, world: int, cuts: int, steps: Callable[[int], Program]) -> Schedule:
    """A schedule in which a block is a part, in its place on every rank."""
    return Schedule(
        collective,
        "hierarchical",
        world,
        cuts=cuts,
        blocks=cuts,
        steps=steps,
        cut=lambda block: block,
        source=lambda rank, block: block,
        target=lambda rank, block: block,
    )


def _over_segments(collective: str, world: int, steps: Callable[[int], Program]) -> Schedule:
    """A schedule in which a block is the segment of a rank: all give something to it, or it gives that to all."""
    gathers = collective == "all_gather"
    return Schedule(
        collective,
        "hierarchical",
        world,
        cuts=1,
        blocks=world,
        steps=steps,
        cut=zero,
        source=lambda rank, block: where(block == rank, 0) if gathers else block,
        target=lambda rank, block: block if gathers else where(block == rank, 0),
    )
