"""Every collective by every algorithm, as data (`pccl.core.step`). `build` makes a schedule; `pccl.collectives.verify` proves it.

A builder describes one wave in roles 0..world-1; ranks, roots, orders and further waves are put on top by `steps.relabel` and
`steps.repeat`.
"""

from pccl.collectives.schedules.meaning import COLLECTIVES, REDUCING, ROOTED
from pccl.collectives.schedules.registry import Algorithm, algorithms, build, find, natural_cuts

__all__ = ["COLLECTIVES", "REDUCING", "ROOTED", "Algorithm", "algorithms", "build", "find", "natural_cuts"]
