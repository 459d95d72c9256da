"""How a run went: checks, a table, and the same as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pccl.tools.demo.driver import Plan
from pccl.tools.demo.history import History
from pccl.tools.demo.screen import STYLES

ACCURACY = 0.95
"""What the held-out images have to be read with"""


class Check(NamedTuple):
    """Something that the demo promises."""

    name: str
    passed: bool
    found: str


class Report:
    """A run that is over."""

    def __init__(self, plan: Plan, history: History) -> None:
        self._plan = plan
        self._history = history
        self.checks = [self._equal(), self._accurate(), self._complete(), self._recovered(), self._joined()]

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return all(check.passed for check in self.checks)

    def show(self, console: Console) -> None:
        """Print it."""
        history = self._history
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("peer", "end", "parameters (xxh3-128)"):
            table.add_column(column, no_wrap=True)
        for column in ("accuracy", "steps", "retried"):
            table.add_column(column, justify="right", no_wrap=True)
        for peer in history.peers.values():
            steps = f"{peer.committed[0]}-{peer.committed[-1]}" if peer.committed else "-"
            accuracy = f"{peer.accuracy:.2%}" if peer.digest else "-"
            table.add_row(
                peer.name, Text(peer.state, style=STYLES[peer.state]), peer.digest or "-", accuracy, steps, str(len(peer.retried))
            )
        console.print("", table, "", highlight=False, sep="\n")
        for check in self.checks:
            console.print(f"{'[green]ok[/]  ' if check.passed else '[bold red]FAILED[/]'}  {check.name}: {check.found}", highlight=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON. Times are in seconds since the peers were let go."""
        history = self._history
        return {
            "peers": self._plan.peers,
            "steps": self._plan.steps,
            "seed": self._plan.seed,
            "passed": self.passed,
            "checks": [check._asdict() for check in self.checks],
            "seconds": history.log[-1].at - history.began if history.log else None,
            "recovery_seconds": history.recovery,
            "lost_steps": history.lost,
            "retried_steps": history.retried,
            "processes": [
                {k: v for k, v in asdict(peer).items() if k != "committed"} | {"steps": len(peer.committed)}
                for peer in history.peers.values()
            ],
            "events": [event._asdict() | {"at": event.at - history.began} for event in history.events],
            "log": [step._asdict() | {"at": step.at - history.began} for step in history.log],
        }

    def _equal(self) -> Check:
        digests = {peer.digest for peer in self._history.survivors}
        same = len(digests) == 1 and "" not in digests
        found = f"the same on all {len(self._history.survivors)} peers" if same else f"{len(digests)} different ones"
        return Check("parameters", same, found)

    def _accurate(self) -> Check:
        lowest = min(peer.accuracy for peer in self._history.survivors)
        return Check("held-out images", lowest >= ACCURACY, f"{lowest:.2%} read right, at least {ACCURACY:.0%} are needed")

    def _complete(self) -> Check:
        history = self._history
        problems = history.problems()
        passed = history.step == history.steps and not history.lost and not problems
        found = f"{len(history.log)} of {history.steps} committed, {history.lost} lost, {history.retried} retried"
        return Check("steps", passed, "; ".join([found, *problems]))

    def _recovered(self) -> Check:
        history = self._history
        step = next((s for s in history.log if s.step == history.kill_step), None)
        passed = history.recovery is not None and step is not None and step.attempts > 1
        found = f"{history.recovery:.3f} s until the survivors had committed the next step" if history.recovery is not None else "none"
        return Check("after the kill", passed, found)

    def _joined(self) -> Check:
        history = self._history
        peer = history.peers.get(f"peer-{self._plan.peers}")
        if peer is None or not peer.committed:
            return Check("newcomer", False, "it never made a step")
        passed = peer.fetched > 0 and peer.state == "finished"
        return Check("newcomer", passed, f"{peer.name} took part from step {peer.committed[0]}, after {peer.fetched / 1e6:.1f} MB of state")
