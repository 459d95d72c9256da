"""`pccl stress`: real processes on this machine, faults at random, every result checked.

`plan` draws the faults from a seed, `driver` plays them, each `worker` runs one training loop and checks its own results against `oracle`,
and `judge` compares what the workers say with one another. `command` is imported when it is used: workers do without it.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "stress_command":
        from pccl.tools.stress.command import stress_command

        return stress_command
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
