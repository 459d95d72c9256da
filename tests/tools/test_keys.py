"""`pccl keys`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pccl.core.address import key_text
from pccl.tools.cli import USAGE
from pccl.transports.keys import load_allowed, load_keypair
from tests.tools.test_cli import run

KEY = "-" * 42 + "A"
"""A key that looks like an option"""


def test_new_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.key"
    assert run("keys", "new", str(file)) == 0
    made = capsys.readouterr().out
    assert run("keys", "show", str(file)) == 0
    assert capsys.readouterr().out == made == key_text(load_keypair(file).public) + "\n"
    assert run("keys", "new", str(file)) == USAGE
    assert "never overwritten" in capsys.readouterr().err


def test_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, allowed = tmp_path / "a.key", tmp_path / "allowed"
    assert run("keys", "new", str(file)) == 0
    key = capsys.readouterr().out.strip()
    assert run("keys", "allow", str(allowed), KEY) == 0
    assert run("keys", "allow", str(allowed), key, "the big one") == 0
    assert [*load_allowed(allowed).values()] == ["", "the big one"]
    assert run("keys", "allow", str(allowed), key) == 0
    assert "already, as the big one" in capsys.readouterr().err
    assert len(load_allowed(allowed)) == 2


def test_allow_completes_the_last_line(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.write_text("# friends")
    assert run("keys", "allow", str(allowed), KEY, "one") == 0
    assert allowed.read_text() == f"# friends\n{KEY} one\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{tmp}/none"], "cannot be read"),
        (["new", "{tmp}/no/such/folder"], "cannot be written"),
        (["allow", "{tmp}/list", "short"], "is not a key"),
        (["allow", "{tmp}/list", KEY, "two\nlines"], "one line"),
        (["allow", "{tmp}/no/list", KEY], "cannot be written"),
    ],
)
def test_errors(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("keys", *(a.format(tmp=tmp_path) for a in arguments)) == USAGE
    assert message in capsys.readouterr().err
