"""MPI as the wheels on PyPI install it."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Mpi(NamedTuple):
    """An implementation. Several may be in one environment: of these files, unlike ``bin/mpiexec`` and ``libmpi.so``, each has its own."""

    launcher: str
    options: tuple[str, ...]
    library: str
    variables: Mapping[str, str]


MPIS = {
    "mpich": Mpi("mpiexec.hydra", (), "libmpi.so.12", {}),
    "openmpi": Mpi(
        "prterun",
        ("--personality", "ompi", "--map-by", ":OVERSUBSCRIBE"),  # or it starts no more processes than there are cores
        "libmpi.so.40",
        {f"{who}_ALLOW_RUN_AS_ROOT{sure}": "1" for who in ("OMPI", "PRTE") for sure in ("", "_CONFIRM")},  # as in containers
    ),
}


class Installed(NamedTuple):
    """An implementation that can be used."""

    launcher: list[str]
    """To this ``-n``, the number of processes, and a command are appended."""
    packages: str
    """The folder of packages in its environment, where mpi4py may be."""


def find(name: str, prefix: Path) -> Installed | None:
    """Look for an implementation, and for mpi4py.

    Args:
        name: one of `MPIS`.
        prefix: an environment: where ``bin`` and ``lib`` are; mpi4py may also be in the environment of this process.
    """
    mpi = MPIS[name]
    launcher, library = prefix / "bin" / mpi.launcher, prefix / "lib" / mpi.library
    packages = sysconfig.get_path("platlib", vars={"base": str(prefix), "platbase": str(prefix)})
    there = launcher.exists() and library.exists()
    if not there or not (importlib.util.find_spec("mpi4py") or Path(packages, "mpi4py").exists()):
        return None
    variables = {"MPI4PY_LIBMPI": str(library), **mpi.variables}
    return Installed(["env", *(f"{key}={value}" for key, value in variables.items()), str(launcher), *mpi.options], packages)
