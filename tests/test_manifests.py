"""Manifests of shared states: what a peer sends is one, or a WireError."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.core.codec import WireError
from pccl.snapshot import HASH_BYTES, Manifest, Snapshot, unpack_manifest

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)
fields = [st.text(max_size=3), st.sampled_from(["", "float32"]), st.lists(st.integers(0, 9), max_size=2), st.integers(0, 40), anything]


def ends(data: bytes) -> None:
    """It is a manifest that can be worked with, or a WireError."""
    try:
        manifest = unpack_manifest(data)
    except WireError:
        return
    assert isinstance(manifest, Manifest)
    for item in manifest.items:
        assert isinstance(item.name, str)
        assert item.nbytes >= 0
        assert all(isinstance(n, int) for n in item.shape)
        if item.dtype and item.content is not None:
            assert [len(item.hash_of(b) or b"") for b in range(item.blocks)] == [HASH_BYTES] * item.blocks
    manifest.pack()


def real() -> bytes:
    snapshot = Snapshot({"w": np.arange(300_000.0), "b": np.zeros(3, np.float16), "step": 5, "name": "x", "none": None}, may_differ=["b"])
    snapshot.hash()
    return snapshot.packed


def test_a_manifest_comes_back() -> None:
    assert unpack_manifest(real()).pack() == real()


@given(st.binary(max_size=100))
def test_any_bytes(data: bytes) -> None:
    ends(data)


@given(st.lists(st.tuples(*fields) | st.lists(anything, max_size=6), max_size=3) | anything)
def test_any_values(items: Any) -> None:
    ends(msgpack.packb(items))


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_any_change(at: int, value: int) -> None:
    raw = bytearray(real_bytes)
    raw[at % len(raw)] = value
    ends(bytes(raw))


real_bytes = real()


ODD = {
    "nested": b"\x91" * 2000,
    "4 G": b"\xdd\xff\xff\xff\xff",
    "a number of hashes": b"\x91\x95\xa1w\xa7float32\x90\x10\x05",
    "no size": b"\x91\x95\xa1w\xa7float32\x90\xa1x\xc0",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_bombs(data: bytes) -> None:
    with pytest.raises(WireError):
        unpack_manifest(data)
