"""What the README and the examples show runs as it stands."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

import pccl

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


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w/.]+)\)", README))))
def test_links_of_the_readme_lead_somewhere(path: str) -> None:
    if path.startswith("docs/") and not (ROOT / "docs").exists():
        pytest.skip("the documents are not in this distribution")
    assert (ROOT / path).is_file()


def test_commands_of_the_readme_exist() -> None:
    from pccl.tools.cli import COMMANDS

    named = set(re.findall(r"^ {4}pccl (\w+)", README, re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ {4}make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
