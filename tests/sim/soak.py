"""Many seeds of the simulator, on all cores: ``python -m tests.sim.soak --seeds 20000``. Ends with 1 if any broke a promise."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.sim.run import run

CHUNK = 20


def work(seeds: range) -> tuple[range, Counter[str], list[str]]:
    """Run some seeds; what happened in them, and what was broken."""
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    broken = []
    for seed in seeds:
        try:
            result = run(seed)
        except Exception as e:
            broken.append(f"{type(e).__name__}: {e}")
        else:
            counts.update(result.book.counts)
            counts.update(f"fault: {line.split(' ')[1] if ' joins' not in line else 'join'}" for line in result.faults)
    return seeds, counts, broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.soak", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args()
    last = args.first + args.seeds
    chunks = [range(n, min(n + CHUNK, last)) for n in range(args.first, last, CHUNK)]
    began, done, total, broken = time.monotonic(), 0, Counter[str](), 0
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for seeds, counts, errors in pool.imap_unordered(work, chunks):
            done += len(seeds)
            total.update(counts)
            broken += len(errors)
            for error in errors:
                print(error, flush=True)
            if done % 500 < CHUNK:
                print(f"{done} of {args.seeds} seeds, {broken} broken, {time.monotonic() - began:.0f} s", flush=True)
    print(", ".join(f"{name} {n}" for name, n in sorted(total.items())))
    print(f"{args.seeds} seeds from {args.first}: {broken} broke a promise, {time.monotonic() - began:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
