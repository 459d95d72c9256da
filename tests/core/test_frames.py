"""Headers: what is packed comes back, and nothing else is one."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from pccl.core.codec import WireError
from pccl.core.frames import HEADER_BYTES, MAX_PAYLOAD, SEAL_ABORTED, SEAL_BYTES, SEAL_GOOD, Header, Kind, pack_header, unpack_header
from pccl.core.types import Epoch

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
epochs = st.builds(Epoch, U32, U32, U32)
slices = st.builds(Header, st.just(int(Kind.DATA)), epochs, U64, U16, U16, U64, st.integers(0, MAX_PAYLOAD), U64)
others = st.builds(Header, st.sampled_from([int(k) for k in Kind]), epochs, U64, U16, U16, U64, st.just(0), U64)


@given(slices | others)
@example(Header(Kind.DATA, Epoch(0, 0, 0), length=MAX_PAYLOAD))
def test_every_header_comes_back(header: Header) -> None:
    packed = pack_header(header)
    assert len(packed) == HEADER_BYTES
    assert unpack_header(packed) == header
    assert unpack_header(memoryview(bytearray(packed + b"payload"))) == header


@given(slices | others, st.data())
def test_a_header_with_any_byte_changed_is_none(header: Header, data: st.DataObject) -> None:
    packed = bytearray(pack_header(header))
    packed[data.draw(st.integers(0, HEADER_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        unpack_header(packed)


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_no_header(noise: bytes) -> None:
    with pytest.raises(WireError):
        unpack_header(noise)


@given(st.binary(min_size=HEADER_BYTES - 4, max_size=HEADER_BYTES - 4))
def test_noise_with_a_right_check_is_no_header_that_makes_trouble(noise: bytes) -> None:
    packed = b"CP" + noise[2:]
    packed += struct.pack("<I", xxhash.xxh32_intdigest(packed))
    header = error = None
    try:
        header = unpack_header(packed)
    except WireError as e:
        error = e
    kind, length = packed[2], struct.unpack_from("<I", packed, 8)[0]
    sound = kind in list(Kind) and length <= MAX_PAYLOAD and (kind == Kind.DATA or length == 0)
    assert (error is None) == sound
    if header is not None:
        assert (header.kind, header.length) == (kind, length)


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.DATA, Epoch(0, 0, 0), length=MAX_PAYLOAD + 1),
        Header(Kind.DATA, Epoch(0, 0, 0), length=(1 << 32) - 1),
        Header(Kind.CREDIT, Epoch(0, 0, 0), length=1),
        Header(Kind.STRIPES + 1, Epoch(0, 0, 0)),
        Header(255, Epoch(0, 0, 0)),
    ],
)
def test_headers_that_make_no_sense(header: Header) -> None:
    with pytest.raises(WireError, match="makes no sense"):
        unpack_header(pack_header(header))


def test_of_another_protocol() -> None:
    body = b"XX" + pack_header(Header(Kind.MARK, Epoch(0, 0, 0)))[2:-4]
    with pytest.raises(WireError, match="makes no sense"):
        unpack_header(body + struct.pack("<I", xxhash.xxh32_intdigest(body)))


@pytest.mark.parametrize("n", range(SEAL_BYTES))
def test_no_mix_of_seals_is_good(n: int) -> None:
    """An abort may come when part of a seal is out."""
    assert len(SEAL_GOOD) == len(SEAL_ABORTED) == SEAL_BYTES
    assert SEAL_GOOD[:n] + SEAL_ABORTED[n:] != SEAL_GOOD
