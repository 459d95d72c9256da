"""Collective communication that survives its peers.

``async with pccl.connect("host:48148") as comm: await comm.all_reduce(x)``, or, in ordinary loops, ``pccl.sync``. See docs/concepts.md.
"""

from __future__ import annotations

import importlib
import logging
import pathlib
from typing import TYPE_CHECKING, Any

_here = pathlib.Path(__file__).resolve().parent
if not (_here / "transports" / "__init__.py").is_file() and (_here.parent / "transports" / "__init__.py").is_file():
    # a checkout in which the links inside pccl/ did not survive: the folders stand beside it
    __path__.append(str(_here.parent))

# ruff: noqa: E402
from pccl.core.dtypes import ReduceOp, premul_sum
from pccl.core.errors import (
    AuthenticationError,
    CollectiveAborted,
    CollectiveError,
    CollectiveMismatch,
    CollectiveTimeout,
    ConnectError,
    Evicted,
    InternalError,
    InvalidArgument,
    MasterUnreachable,
    PcclError,
    StateConflict,
    TooFewPeers,
    VersionMismatch,
)
from pccl.core.options import DEFAULT_PORT, Options
from pccl.core.quantization import Quantization
from pccl.core.types import Epoch, Info, Member, RoundInfo, StateInfo, View

if TYPE_CHECKING:
    from pccl import sync
    from pccl.communicator import Communicator, connect
    from pccl.master import Master

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_PORT",
    "AuthenticationError",
    "CollectiveAborted",
    "CollectiveError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "Communicator",
    "ConnectError",
    "Epoch",
    "Evicted",
    "Info",
    "InternalError",
    "InvalidArgument",
    "Master",
    "MasterUnreachable",
    "Member",
    "Options",
    "PcclError",
    "Quantization",
    "ReduceOp",
    "RoundInfo",
    "StateConflict",
    "StateInfo",
    "TooFewPeers",
    "VersionMismatch",
    "View",
    "connect",
    "premul_sum",
    "sync",
]

logging.getLogger("pccl").addHandler(logging.NullHandler())

_LAZY = {"connect": "pccl.communicator", "Communicator": "pccl.communicator", "Master": "pccl.master", "sync": "pccl.sync"}


def __getattr__(name: str) -> Any:
    """What needs asyncio, ZeroMQ and the engine is imported when it is first used: importing pccl stays quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pccl' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    found = module if name == "sync" else getattr(module, name)
    globals()[name] = found
    return found
