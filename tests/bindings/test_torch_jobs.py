"""Whole jobs, in processes that know nothing of pccl but its name."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", minversion="2.5")

JOB = ["-m", "tests.bindings.job"]
ROOT = Path(__file__).parents[2]
LIMIT = 100.0


def environment(**variables: str) -> dict[str, str]:
    """Of a process of a job: without what another launcher has left, and with one core's worth of threads."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PCCL_MASTER")
    }
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables


@contextmanager
def processes(commands: list[list[str]], variables: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run these, and end what is left of them."""
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(**one),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command, one in zip(commands, variables, strict=True)
    ]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run(commands: list[list[str]], variables: list[dict[str, str]], *, dead: tuple[int, ...] = ()) -> list[Any]:
    """What each says at its end."""
    found = []
    with processes(commands, variables) as started:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=LIMIT)
            assert process.returncode == (-signal.SIGKILL if rank in dead else 0), err[-3000:]
            found.append(None if rank in dead else json.loads(out.strip().splitlines()[-1]))
    return found


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def job(what: str, world: int, *, backend: str = "pccl", dead: tuple[int, ...] = ()) -> list[Any]:
    """By ``env://``."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    return run([[*JOB, what, backend]] * world, [where | {"RANK": str(rank)} for rank in range(world)], dead=dead)


@pytest.mark.parametrize("world", [2, 3])
def test_a_job_that_knows_only_the_name(world: int) -> None:
    assert job("check", world) == ["ok"] * world


@pytest.mark.parametrize("scheme", ["tcp", "file"])
def test_ways_to_meet(scheme: str, tmp_path: Path) -> None:
    where = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"file://{tmp_path / 'store'}"
    command = [*JOB, "check", "pccl", f"init_method={where}", "world_size=2"]
    assert run([[*command, f"rank={rank}"] for rank in range(2)], [{}, {}]) == ["ok", "ok"]


def test_torchrun() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *JOB, "check", "pccl"]
    assert run([command], [{}]) == ["ok"]


def test_losses_are_those_of_gloo() -> None:
    expected = job("ddp", 2, backend="gloo")
    for how in ("ddp", "fsdp"):
        found = job(how, 2)
        assert found[0] == found[1]
        assert found[0] == pytest.approx(expected[0], rel=1e-4), how
    assert expected[0][-1] < expected[0][0] / 2


def test_hooks_and_checkpoints() -> None:
    assert job("hooks", 2) == ["ok", "ok"]


def test_the_others_go_on_when_one_dies() -> None:
    assert job("lose_one", 3, dead=(2,)) == ["ok", "ok", None]
