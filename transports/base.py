"""The whole seam to the outside: links between peers, and the control channel between a peer and its master.

Everything here runs on one event loop and is called from its thread only, or from a thread that has it all to itself while the loop stands
still: that one polls `fileno` and calls `receive` where the loop would. Handlers are called back from that loop, never from inside
the call that caused it (so a handler may call anything), and never after `close`. The one exception, for speed: `Link.wake` asks for
frames and tells of sent ones before it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, Protocol

from pccl.core.frames import Header
from pccl.transports.region import OtherShared

MOST_SMALL = 64 << 10
"""Payload bytes up to which frames are small: they keep their order. Larger ones may take other ways to the peer, and overtake."""


class OutFrame(NamedTuple):
    """A frame to send. Its payload stays untouched until the handler hears that it was sent, aborts it, or the link is lost."""

    header: Header
    payload: memoryview | None
    token: object
    """What the frame can be aborted by."""
    note: object = None
    """Whatever else the handler wants to know of it."""


class LinkHandler(Protocol):
    """Whoever uses a link: it is asked for frames when there is room for them, and told what came."""

    def next_frame(self, link: Link, *, small: bool = True, large: bool = True) -> OutFrame | None:
        """What to send next, if anything: of frames of up to MOST_SMALL bytes and of larger ones those that are asked for."""

    def frame_sent(self, link: Link, frame: OutFrame) -> None:
        """The kernel has the whole frame: its memory is free again. Not called for a frame that `abort` has voided."""

    def frame_begun(self, link: Link, header: Header) -> memoryview | None:
        """A DATA frame with a payload begins. Returns where that goes (exactly `length` bytes), or None to drop it."""

    def frame_ended(self, link: Link, header: Header, good: bool) -> None:
        """A frame is complete. Not good: its sender voided it, and what was written is worthless."""

    def link_changed(self, link: Link) -> None:
        """The link has other `sources` than before."""

    def link_lost(self, link: Link, error: Exception) -> None:
        """The link ended by itself; the last call for it. A WireError says that the other side broke the protocol."""


class Source(Protocol):
    """Something to receive from."""

    def fileno(self) -> int:
        """What to poll for reading; -1 if there is nothing."""

    def receive(self) -> None:
        """Take in what has come."""


class Link(ABC):
    """A connection to one peer that has proved the epoch's secret; carries frames both ways.

    Frames without payload and small ones come in the order in which they were sent. A DISCARDED or MARK comes after everything that was
    sent before it.
    """

    uid: int
    """The peer's."""
    near: OtherShared | None = None
    """What a peer of the same host shares with this one, as long as the link is open"""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor to poll for reading; -1 if there is none."""

    @abstractmethod
    def receive(self) -> None:
        """Take in what has come."""

    def sources(self) -> Iterable[Source]:
        """All that it receives from."""
        return (self,)

    @abstractmethod
    def wake(self) -> None:
        """There may be frames to send. Sends what fits at once."""

    @abstractmethod
    def abort(self, token: object) -> None:
        """Let go of the memory of frames with this token, at once: one begun is completed from elsewhere and marked void."""

    @abstractmethod
    def redirect(self, header: Header) -> None:
        """Let go of the memory that this frame, which is coming in, was to go to, at once: the rest of it is dropped."""

    @abstractmethod
    def silent_for(self) -> float:
        """Seconds that sent data has been waiting for any acknowledgement by the other host; 0 where there is none outstanding.

        A peer that does not read is not silent: its host acknowledges.
        """

    @abstractmethod
    def close(self) -> None:
        """Send what was handed over, as far as the other side takes it soon, and end. The handler hears no more."""


class Refusal(Exception):
    """A link could not be made: nobody listens, the proof is wrong, or time ran out. The text says which."""


class LinkTicket(NamedTuple):
    """What two peers need to make a link: both name the admission and prove that they know its secret."""

    admission: int
    secret: bytes
    dialer: int
    """Uid of the peer that dials."""
    acceptor: int


Admit = Callable[[int, int, int], Awaitable[LinkTicket | None]]
"""(admission, dialer, acceptor) as a stranger claims them -> the ticket to prove, or None; may wait for news from the master."""


class Transport(ABC):
    """Makes links."""

    @abstractmethod
    async def listen(self, admit: Admit, accepted: Callable[[Link], LinkHandler]) -> tuple[str, ...]:
        """Accept links from now on; returns the endpoints at which others may dial. `accepted` gets each link that has proved itself."""

    @abstractmethod
    async def dial(self, endpoints: tuple[str, ...], ticket: LinkTicket, handler: LinkHandler, timeout: float) -> Link:
        """Make a link to the peer at the first of the endpoints that answers.

        Raises:
            Refusal: no endpoint led to a proved link within the timeout.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop accepting. Links that exist live on."""


# --- control channel ------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Where a control message comes from; one value per connection, never used again for another."""

    number: int
    host: str
    key: str
    """The peer's public key as text, proved; empty in plaintext."""


class ServerHandler(Protocol):
    """The master's shell, as its control server sees it."""

    def received(self, origin: Origin, data: bytes) -> None:
        """A message of a connection; the first one makes the connection known."""

    def disconnected(self, origin: Origin) -> None:
        """The connection ended, or its peer fell silent for the heartbeat timeout. The last call for this origin."""


class ControlServer(ABC):
    """The master's end of all control connections."""

    @abstractmethod
    async def start(self, handler: ServerHandler) -> str:
        """Serve from now on; returns the address for peers.

        Raises:
            ConnectError: the address cannot be listened on.
        """

    @abstractmethod
    def send(self, origin: Origin, data: bytes) -> None:
        """Queue a message; of a connection that is no more, dropped.

        Raises:
            InvalidArgument: the message is longer than MAX_MESSAGE.
        """

    @abstractmethod
    def cut(self, origin: Origin) -> None:
        """End a connection; `disconnected` follows."""

    @abstractmethod
    async def close(self) -> None:
        """Stop serving; what was queued gets a moment to leave."""


class ClientHandler(Protocol):
    """A peer's engine, as its control client sees it."""

    def control_up(self) -> None:
        """Connected, or connected again. No message of an earlier connection is delivered after this."""

    def control_received(self, data: bytes) -> None:
        """A message of the current connection."""

    def control_down(self) -> None:
        """The connection ended; the client keeps trying."""

    def control_refused(self, error: Exception) -> None:
        """The master will not have this peer (AuthenticationError, or ConnectError): trying again is of no use."""


class ControlClient(ABC):
    """A peer's end of its control connection."""

    @abstractmethod
    async def start(self, handler: ClientHandler) -> None:
        """Begin to connect; returns at once."""

    def fileno(self) -> int:
        """A descriptor to poll for reading, between two calls of `receive`; -1 if there is none."""
        return -1

    @abstractmethod
    def receive(self) -> None:
        """Take in what has come."""

    @abstractmethod
    def send(self, data: bytes) -> None:
        """Queue a message for the current connection; between connections, dropped.

        Raises:
            InvalidArgument: the message is longer than MAX_MESSAGE.
        """

    @abstractmethod
    async def close(self) -> None:
        """End the connection; what was queued gets a moment to leave."""
