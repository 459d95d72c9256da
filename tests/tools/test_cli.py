"""The command line: its table, its errors and their exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import pccl
from pccl.tools import cli


def run(*arguments: str) -> int:
    """Run the command line; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_is_there_and_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(cli.COMMANDS[name].load())
    assert run(name, "--help") == 0
    assert f"{name} [OPTIONS]" in capsys.readouterr().out


def test_help_names_all_commands_and_loads_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.Command, "load", lambda self: pytest.fail(f"{self.where} was loaded"))
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in shown
        assert command.help[:20] in shown


@pytest.mark.parametrize(
    "arguments",
    [[], ["no-such-command"], ["version", "--no-such-option"], ["demo", "--peers", "2"], ["demo", "--json", "/no/such/folder/a.json"]],
)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == cli.USAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (pccl.InvalidArgument("x"), 2),
        (pccl.ConnectError("x"), 3),
        (pccl.MasterUnreachable("x"), 3),
        (pccl.AuthenticationError("x"), 3),
        (pccl.CollectiveTimeout("x"), 4),
        (pccl.CollectiveAborted("x"), 1),
        (pccl.Evicted("x"), 1),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: pccl.PcclError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(cli.Command, "load", lambda self: command)
    assert run("version") == code
    assert capsys.readouterr().err == f"pccl: {error}\n"


def test_ctrl_c_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        """Be interrupted."""
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli.Command, "load", lambda self: command)
    assert run("version") == 130
    assert capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("version") == 0
    assert capsys.readouterr().out.startswith(f"pccl {pccl.__version__}, Python 3.")


@pytest.mark.process
def test_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "pccl.tools", "version"], capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith("pccl ")
    assert done.returncode == 0
