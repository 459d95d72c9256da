"""Whether members can reach each other, what would mend it, and who has to go if nothing does."""

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
        reach = _reach(left, broken)
        if len(reach[left[0]]) == len(left):
            break
        worst = min(left, key=lambda u: (len(reach[u]), -u))
        left.remove(worst)
        out.add(worst)
    return out


def gaps(uids: Collection[int], broken: Collection[Link]) -> list[Link]:
    """The broken links of which any would connect members that cannot reach each other, not even through others."""
    reach = _reach(sorted(uids), broken)
    return sorted(link for link in broken if link.low in reach and link.high in reach and link.high not in reach[link.low])


def _reach(uids: list[int], broken: Collection[Link]) -> dict[int, set[int]]:
    """Whom each member can reach, itself included, directly or through others."""
    reach: dict[int, set[int]] = {}
    for start in uids:
        if start in reach:
            continue
        seen, frontier = {start}, [start]
        while frontier:
            u = frontier.pop()
            near = [v for v in uids if v not in seen and Link(min(u, v), max(u, v)) not in broken]
            seen.update(near)
            frontier += near
        reach.update(dict.fromkeys(seen, seen))
    return reach
