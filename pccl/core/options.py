"""The settings of a communicator and of a master, in one place, with units and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pccl.core.errors import InvalidArgument

DEFAULT_PORT = 48148
"""Where a master listens unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Times are in seconds."""

    timeout: float | None = 600.0
    """Default deadline of a call, covering all its attempts; None waits for ever."""
    connect_timeout: float | None = 60.0
    """How long ``connect`` waits until it is admitted."""
    heartbeat_interval: float = 0.5
    """How often a peer's engine says that it is alive, and how far it has come."""
    heartbeat_timeout: float = 3.0
    """Silence of both heartbeats after which a peer is lost."""
    stall_timeout: float = 30.0
    """How long an interpreter may be held, or a call that all have entered may stand still."""
    takeover_timeout: float = 15.0
    """How long an overdue call waits for a verdict while there may be no master; then its peer gives up its membership."""
    dial_timeout: float = 2.0
    """How long a link may take to be made and proved."""
    path_timeout: float = 2.0
    """A link is broken when data on it has waited that long for an acknowledgement."""
    log_waiting: float = 30.0
    """A call that waits that long is logged, with the names of those that have not made it."""
    min_world_size: int = 1
    """Collectives raise TooFewPeers, and ``update`` and ``connect`` wait, while the group is smaller."""
    max_in_flight: int = 4096
    """Calls of one communicator that may be in flight; one more raises."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is None and name in ("timeout", "connect_timeout"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidArgument(f"{name}: a number is needed, not {value!r}")
            if name in ("min_world_size", "max_in_flight"):
                if not isinstance(value, int) or value < 1:
                    raise InvalidArgument(f"{name}: an integer of at least 1 is needed, not {value!r}")
            elif not value > 0:  # also refuses nan
                raise InvalidArgument(f"{name}: a time above 0 s is needed, not {value!r}")


def check_timeout(value: float | None, name: str = "timeout") -> float | None:
    """The timeout of one call as it was given: a number of seconds of at least 0, or None for none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise InvalidArgument(f"{name}: seconds of at least 0 or None are needed, not {value!r}")
    return float(value)
