"""Frames in a stream of bytes: however they are split, the same frames come out; whatever is aborted, only good ones are called good."""

from __future__ import annotations

import tracemalloc
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from pccl.core.codec import WireError
from pccl.core.frames import HEADER_BYTES, SEAL_BYTES, SEAL_GOOD, Header, Kind, pack_header
from pccl.core.types import Epoch
from pccl.transports.base import OutFrame
from pccl.transports.framing import BATCH_BYTES, BATCH_FRAMES, STAGE_BYTES, FrameReader, FrameWriter

EPOCH = Epoch(1, 2, 3)
lengths = st.one_of(
    st.integers(0, 10), st.integers(0, 3000), st.sampled_from([STAGE_BYTES - 1, STAGE_BYTES, STAGE_BYTES + 1, 40_000, 300_000])
)
bad_seals = st.binary(min_size=SEAL_BYTES, max_size=SEAL_BYTES).filter(lambda seal: seal != SEAL_GOOD)
pieces = st.lists(st.integers(1, 100) | st.integers(1, 50_000), min_size=1, max_size=20)


def payload(call: int, length: int) -> bytes:
    return (b"%05d," % call * (length // 6 + 1))[:length]


class Reading:
    """Feeds bytes to a reader, in pieces, as reads would; keeps what it says.

    Args:
        refuse: calls without a place.
        redirect: calls that are redirected when so many bytes of them have come.
    """

    def __init__(self, refuse: frozenset[int] = frozenset(), redirect: dict[int, int] | None = None) -> None:
        self.frames: list[tuple[int, bool]] = []
        self.contents: dict[int, bytearray] = {}
        self._refuse = refuse
        self._redirect = dict(redirect or {})
        self._present: Header | None = None
        self.reader = FrameReader()
        self.reader.serve(self._begun, self._ended)

    def _begun(self, header: Header) -> memoryview | None:
        assert self._present is None
        self._present = header
        if header.call in self._refuse:
            return None
        self.contents[header.call] = bytearray(header.length)
        return memoryview(self.contents[header.call])

    def _ended(self, header: Header, good: bool) -> None:
        assert header.length == 0 or self._present == header
        self._present = None
        self.frames.append((header.call, good))

    def feed(self, data: bytes, sizes: list[int]) -> None:
        """The sizes are used in turn; a read takes no more than the buffers hold."""
        rest, turn = memoryview(data), 0
        while rest:
            room = rest[: sizes[turn % len(sizes)]]
            turn += 1
            n = 0
            for buffer in self.reader.buffers():
                assert len(buffer) > 0
                part = room[n : n + len(buffer)]
                buffer[: len(part)] = part
                n += len(part)
            rest = rest[n:]
            self.reader.received(n)
            if self._present and self._redirect.get(self._present.call, 1 << 60) <= len(data) - len(rest):
                self.reader.redirect()
                self.contents[self._present.call][:] = b"-" * self._present.length
                del self._redirect[self._present.call]


def stream_of(frames: list[int], seals: dict[int, bytes] | None = None) -> bytes:
    out = []
    for call, length in enumerate(frames):
        out.append(pack_header(Header(Kind.DATA, EPOCH, call, length=length)))
        if length:
            out += [payload(call, length), (seals or {}).get(call, SEAL_GOOD)]
    return b"".join(out)


# --- reading --------------------------------------------------------------------------------------------------------


@given(st.lists(lengths, max_size=12), pieces)
def test_however_the_bytes_are_split_the_same_frames_come(frames: list[int], sizes: list[int]) -> None:
    reading = Reading()
    reading.feed(stream_of(frames), sizes)
    assert reading.frames == [(call, True) for call in range(len(frames))]
    assert reading.contents == {call: payload(call, length) for call, length in enumerate(frames) if length}


@given(st.lists(lengths, max_size=8), pieces, st.data())
def test_bad_seals_and_frames_without_a_place_harm_no_other(frames: list[int], sizes: list[int], data: st.DataObject) -> None:
    calls = [call for call, length in enumerate(frames) if length]
    bad = {call: data.draw(bad_seals) for call in calls if data.draw(st.booleans())}
    refuse = frozenset(call for call in calls if data.draw(st.booleans()))
    reading = Reading(refuse)
    reading.feed(stream_of(frames, bad), sizes)
    assert reading.frames == [(call, call not in bad and call not in refuse) for call in range(len(frames))]
    assert all(reading.contents[call] == payload(call, frames[call]) for call in calls if call not in refuse)


@given(st.integers(1, 100_000), st.integers(1, 100_000), pieces)
def test_after_a_redirect_nothing_is_written_to_the_old_place(length: int, when: int, sizes: list[int]) -> None:
    reading = Reading(redirect={0: when})
    reading.feed(stream_of([length, 7]), sizes)
    redirected = not reading._redirect
    assert reading.frames == [(0, not redirected), (1, True)]
    assert reading.contents[0] == (b"-" * length if redirected else payload(0, length))
    assert reading.contents[1] == payload(1, 7)


@given(st.lists(st.integers(0, 3000), max_size=4), st.binary(min_size=1, max_size=3000), pieces)
def test_noise_behind_frames_ends_the_reader_after_them(frames: list[int], noise: bytes, sizes: list[int]) -> None:
    """Noise shorter than a header is a header that has not come."""
    reading = Reading()
    broke = False
    try:
        reading.feed(stream_of(frames) + noise, sizes)
    except WireError:
        broke = True
    assert broke == (len(noise) >= HEADER_BYTES)
    assert reading.frames == [(call, True) for call in range(len(frames))]


def test_a_reader_stages_little() -> None:
    data = stream_of([1 << 20])
    tracemalloc.start()
    try:
        reading = Reading(refuse=frozenset([0]))
        reading.feed(data, [1 << 20])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reading.frames == [(0, False)]
    assert peak < 4 * STAGE_BYTES


# --- writing --------------------------------------------------------------------------------------------------------


class Writing:
    """A writer with a queue, whose bytes are taken in pieces."""

    def __init__(self, frames: list[OutFrame]) -> None:
        self.queue = deque(frames)
        self.pulled: list[int] = []
        self.sent: list[int] = []
        self.out = bytearray()
        self.abort_when_sent: dict[int, int] = {}
        """call -> the token that its handler aborts"""
        self.aborted: set[int] = set()
        self.writer = FrameWriter()
        self.writer.serve(self._pull, self._sent)

    def _pull(self) -> OutFrame | None:
        if not self.queue:
            return None
        self.pulled.append(self.queue[0].header.call)
        return self.queue.popleft()

    def _sent(self, frame: OutFrame) -> None:
        self.sent.append(frame.header.call)
        assert frame.token not in self.aborted
        if frame.header.call in self.abort_when_sent:
            self.abort(self.abort_when_sent[frame.header.call])

    def abort(self, token: int) -> None:
        """As a flow does: what was not pulled is never pulled."""
        self.aborted.add(token)
        self.writer.abort(token)
        self.queue = deque(f for f in self.queue if f.token is not token)

    def write(self, n: int) -> bool:
        """The system takes up to n bytes."""
        buffers = self.writer.buffers()
        assert len(buffers) <= 3 * BATCH_FRAMES
        taken = b"".join(buffers)[:n]
        self.out += taken
        self.writer.advance(len(taken))
        return bool(taken)


def out_frame(call: int, length: int, token: int) -> tuple[OutFrame, bytearray]:
    memory = bytearray(payload(call, length))
    return OutFrame(Header(Kind.DATA, EPOCH, call, length=length), memoryview(memory) if length else None, token), memory


@given(st.lists(st.tuples(lengths, st.integers(0, 2)), max_size=12), pieces, st.data())
def test_whatever_is_aborted_good_frames_are_whole(frames: list[tuple[int, int]], sizes: list[int], data: st.DataObject) -> None:
    made = [out_frame(call, length, token) for call, (length, token) in enumerate(frames)]
    writing = Writing([frame for frame, _ in made])
    writing.abort_when_sent = data.draw(st.dictionaries(st.integers(0, 12), st.integers(0, 2), max_size=2))
    moments = data.draw(st.dictionaries(st.integers(0, 20), st.integers(0, 2), max_size=3))
    turn = 0
    while True:
        if turn in moments:
            writing.abort(moments[turn])
        for token in writing.aborted:
            for (_, its), (_, memory) in zip(frames, made, strict=True):
                if its == token:
                    memory[:] = b"-" * len(memory)
        if not writing.write(sizes[turn % len(sizes)]) and turn > 20:
            break
        turn += 1
    reading = Reading()
    reading.feed(bytes(writing.out), [1 << 16])
    good = [call for call, is_good in reading.frames if is_good]
    assert set(writing.sent) <= set(good)
    assert all(frames[call][1] in writing.aborted for call in set(good) - set(writing.sent))
    assert all(reading.contents.get(call, b"") == payload(call, frames[call][0]) for call in good)
    assert not any(b"-" in content for content in reading.contents.values())
    assert writing.sent == sorted(writing.sent)
    assert [call for call, _ in reading.frames] == sorted({call for call, _ in reading.frames})
    assert all(call in good for call, (_, token) in enumerate(frames) if token not in writing.aborted)


@given(st.lists(lengths, max_size=40))
def test_the_writer_takes_no_more_than_a_batch_ahead(frames: list[int]) -> None:
    made = [out_frame(call, length, 0)[0] for call, length in enumerate(frames)]
    writing = Writing(made)
    writing.writer.buffers()
    taken = [frames[call] + HEADER_BYTES + SEAL_BYTES for call in writing.pulled]
    assert len(taken) <= BATCH_FRAMES
    assert sum(taken[:-1]) < BATCH_BYTES
    assert not writing.sent
    if frames:
        assert taken
