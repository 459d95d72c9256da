"""What the README, the examples and the documents show runs as it stands, and is true."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import pccl
from pccl.core import codec, frames, messages
from pccl.core.types import CallId, Epoch

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.process


async def run(*arguments: str, **env: str) -> str:
    """What a Python program prints; warnings are errors in it."""
    command = [sys.executable, "-W", "error", *arguments]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, env=os.environ | env, cwd=ROOT)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_example_of_the_readme(tmp_path: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in source.splitlines() if line]) <= 21
    program = tmp_path / "example.py"
    program.write_text(source)
    lines = (await run(str(program))).splitlines()
    ends = dict(line.split(": ", 1) for line in lines)
    assert ends.keys() == {"alice", "bob"}
    assert ends["alice"] == ends["bob"]
    assert ends["alice"].startswith("2 peers, ")


async def test_example_for_two_machines() -> None:
    script = str(ROOT / "examples" / "train_two_machines.py")
    options = ["--steps", "150", "--min-peers", "2"]
    async with pccl.Master() as master:
        one, two = await asyncio.gather(run(script, master.address, *options), run(script, *options, PCCL_MASTER=master.address))
    assert "step 0: loss" in one
    assert "step 100: loss" in two
    last = one.splitlines()[-1]
    assert last.startswith("parameters: ")
    assert two.splitlines()[-1] == last


DOCUMENTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", DOCUMENTS[name]):
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path
        assert found.is_file(), target
        headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


FRAGMENTS = re.findall(r"```python\n(.*?)```", DOCUMENTS["docs/concepts.md"], re.DOTALL)


@pytest.mark.parametrize("source", FRAGMENTS, ids=range(len(FRAGMENTS)))
async def test_fragments_of_the_concepts_run(source: str) -> None:
    """Each with a group of its own, of one peer."""
    names: dict[str, Any] = {"pccl": pccl, "np": np, "asyncio": asyncio}
    kind = "async def" if "async" in source else "def"
    exec(f"{kind} main(address):\n" + textwrap.indent(source, "    "), names)
    async with pccl.Master() as master:
        await (names["main"](master.address) if kind == "async def" else asyncio.to_thread(names["main"], master.address))


def test_timeouts_of_the_guarantees_are_the_defaults() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| (`[^|]+`) \|$", DOCUMENTS["docs/guarantees.md"], re.MULTILINE)
    told = {name for _, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert {"heartbeat_timeout", "stall_timeout", "takeover_timeout", "timeout", "path_timeout", "dial_timeout"} <= told
    for text, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            default = getattr(pccl.Options(), name)
            assert name in ("timeout", "heartbeat_interval") or f"{default:g} s" in text, name


# --- docs/protocol.md ---------------------------------------------------------------------------------------------------

PROTOCOL = DOCUMENTS["docs/protocol.md"]


def test_protocol_names_every_message() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| ([\w, ]+) \|", PROTOCOL, re.MULTILINE)
    told = {int(code): (name, *fields.split(", ")) for code, name, fields in rows}
    assert len(rows) == len(told)
    assert told == {code: (cls.__name__, *(f.name for f in fields(cls))) for code, (cls, _) in codec._class_of.items()}


def test_examples_of_messages() -> None:
    welcome = messages.Welcome(rid=7, heartbeat_interval=0.5)
    overdue = messages.Overdue(comm=0, epoch=EPOCH, call=CallId(None, 12), reason=messages.Reason.DEADLINE, detail="late")
    for example in (welcome, overdue):
        assert f"    {type(example).__name__}(" in PROTOCOL
        assert f"    {codec.encode(example).hex(' ')}\n" in PROTOCOL


EPOCH = Epoch(1, 7, 3)


def test_example_of_a_header() -> None:
    packed = frames.pack_header(frames.Header(frames.Kind.DATA, EPOCH, call=12, length=8, signature=0x1122334455667788))
    assert packed.hex(" ") in " ".join(PROTOCOL.split())
    assert f"A header of {len(packed)} bytes" in PROTOCOL


def test_table_of_the_header() -> None:
    header = frames.Header(frames.Kind.DATA, Epoch(11, 12, 13), call=14, sub=15, channel=16, position=17, length=18, signature=19)
    packed = frames.pack_header(header)
    rows = re.findall(r"^\| (\d+)(?:-(\d+))? \| (\w*) \|", PROTOCOL, re.MULTILINE)
    found = {name: int.from_bytes(packed[int(first) : int(last or first) + 1], "little") for first, last, name in rows}
    expected: dict[str, int] = header._asdict() | header.epoch._asdict() | {"magic": 0x5043, "check": xxhash.xxh32_intdigest(packed[:48])}
    del expected["epoch"]
    assert found == expected


def test_flags() -> None:
    (told,) = re.findall(r"`Enter.flags`: (.*?)\.\n", PROTOCOL, re.DOTALL)
    assert [int(number) for number in re.findall(r"\b\d\b", told)] == list(messages.Flag)


def test_kinds_and_limits_of_frames() -> None:
    assert ", ".join(f"{kind.value} {kind.name}" for kind in frames.Kind) in PROTOCOL
    assert f"at most {frames.MAX_PAYLOAD >> 20} MiB" in PROTOCOL
    assert f"at most {codec.MAX_MESSAGE >> 20} MiB" in PROTOCOL
    assert f"Version {messages.PROTOCOL_VERSION}." in PROTOCOL
    for seal in (frames.SEAL_GOOD, frames.SEAL_ABORTED):
        assert f"`{seal.decode()}`" in PROTOCOL


# --- commands -----------------------------------------------------------------------------------------------------------


def test_commands_of_the_readme_exist() -> None:
    from pccl.tools.cli import COMMANDS

    named = set(re.findall(r"^ {4}pccl (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
