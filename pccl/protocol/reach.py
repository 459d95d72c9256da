"""Who has to go when members cannot reach each other."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from pccl.core.messages import Link


def outcasts(uids: Iterable[int], broken: Collection[Link]) -> set[int]:
    """The fewest members without whom the rest is connected by links that work: again and again the one that reaches the fewest others
    leaves; of equals, the younger (the higher uid).
    """
    left = sorted(uids)
    out: set[int] = set()
    while left:
        sizes = _component_sizes(left, broken)
        if sizes[left[0]] == len(left):
            break
        worst = min(left, key=lambda u: (sizes[u], -u))
        left.remove(worst)
        out.add(worst)
    return out


def _component_sizes(uids: list[int], broken: Collection[Link]) -> dict[int, int]:
    """How many members each member can reach, itself included, directly or through others."""
    sizes: dict[int, int] = {}
    for start in uids:
        if start in sizes:
            continue
        seen, frontier = {start}, [start]
        while frontier:
            u = frontier.pop()
            near = [v for v in uids if v not in seen and Link(min(u, v), max(u, v)) not in broken]
            seen.update(near)
            frontier += near
        sizes.update(dict.fromkeys(seen, len(seen)))
    return sizes
