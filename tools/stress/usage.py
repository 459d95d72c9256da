"""What a process holds, and where it is: read from /proc and from the inside of the library, for reports and for the log of a hang."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import pccl
from pccl.engine import Engine

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def usage(comm: pccl.Communicator | None) -> dict[str, int]:
    """Memory (bytes), descriptors, sockets among them, threads, and tasks of both event loops."""
    found = {"memory": 0, "descriptors": 0, "sockets": 0, "threads": 0, "tasks": len(asyncio.all_tasks())}
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        with open("/proc/self/statm") as file:
            found["memory"] = int(file.read().split()[1]) * PAGE_BYTES
        targets = [_target(name) for name in os.listdir("/proc/self/fd")]
        found["descriptors"] = len(targets)
        found["sockets"] = sum(target.startswith("socket:") for target in targets)
        found["threads"] = len(os.listdir("/proc/self/task"))
    if comm is not None:
        found["tasks"] += len(asyncio.all_tasks(getattr(comm._runtime, "_loop", None)))
    return found


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # the one for the listing itself
        return ""


def describe(comm: pccl.Communicator | None) -> str:
    """Every task of this loop, and every call, link and stream of the engine."""
    lines = [f"--- tasks: {len(asyncio.all_tasks())}"]
    lines += [f"{task.get_name()}: {[str(f) for f in task.get_stack(limit=4)]}" for task in asyncio.all_tasks()]
    if comm is not None:
        lines += _describe_engine(comm._runtime.engine)
    return "\n".join(lines)


def _describe_engine(engine: Engine) -> list[str]:
    lines = [f"--- engine: error {engine.error}"]
    peer: Any = engine._peer
    if peer is None:
        return lines
    lines.append(f"peer {peer.uid}, {peer.standpoint}")
    for n, membership in peer.comms.items():
        lines.append(
            f"communicator {n}: {membership.view}, members {[m.uid for m in membership.view.members]}, stopped {membership.stopped}"
        )
        lines.append(f"  news {membership._news}, floor {membership._floor}, next {membership.next_index}, leaving {membership._leaving}")
        for record in [*membership._open.values(), *membership._queue]:
            lines.append(f"  {record.id} {record.state} {record.op.description} {record}")
            lines += [f"    {transfer.key}: {_pick(transfer)}" for transfer, op in engine._running.items() if op is record.op]
    lines += [f"flow {uid}: {_pick(flow)}; link {_pick(flow.link)}" for uid, flow in engine.executor.flows.items()]
    return lines


def _pick(thing: object) -> dict[str, str]:
    """Its attributes, briefly."""
    names = getattr(thing, "__slots__", None) or vars(thing) if thing is not None else ()
    return {name: repr(getattr(thing, name, None))[:120] for name in names}


def describe_master(master: pccl.Master) -> str:
    """Every group, its members, and its open calls."""
    lines = []
    for group in master._shell._groups.values():
        lines.append(
            f"--- group {group.name!r}: epoch number {group._number}, admission {group._admission}, takeover {group._takeover_ends}"
        )
        lines += [f"member {uid}: {_pick(peer)}" for uid, peer in group.peers.items()]
        lines += [f"waiting: {_pick(peer)}" for peer in group.pending]
        for ledger in group.ledgers.values():
            lines.append(f"communicator {ledger.comm}: epoch {ledger.epoch}, {ledger.phase}, leaving {ledger.leaving}, news {ledger._news}")
            lines.append(f"  standings {ledger.standings}, reports of {list(ledger.reports)}")
            lines += [f"  {call}" for call in ledger.calls.values()]
    return "\n".join(lines)
