"""`pccl version`."""

import platform

import typer

import pccl


def version_command() -> None:
    """Print the versions of pccl and of Python."""
    typer.echo(f"pccl {pccl.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
