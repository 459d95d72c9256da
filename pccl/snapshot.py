"""A state as sync_state sees it: tensors in blocks with their hashes, small values, and the manifest that names them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from pccl.collectives.tensors import Memory, memory_of
from pccl.core.codec import WireError
from pccl.core.errors import InvalidArgument

BLOCK_BYTES = 1 << 20
"""What is hashed, compared and fetched as one."""
HASH_BYTES = 16
VALUE_BYTES = 1 << 20
"""Longest string or bytes among the values; more than that is a tensor."""
HASHERS = 4
"""Threads that hash"""


class Item(NamedTuple):
    """One entry of a manifest."""

    name: str
    dtype: str
    """Empty for a value."""
    shape: tuple[int, ...]
    nbytes: int
    content: Any
    """The value; or the hashes of the tensor's blocks, one after the other; or None for a tensor that may differ."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.nbytes // BLOCK_BYTES) if self.dtype else 0

    def hash_of(self, block: int) -> bytes | None:
        """A block's hash; None if the tensor may differ."""
        return None if self.content is None else self.content[block * HASH_BYTES : (block + 1) * HASH_BYTES]


class Manifest(NamedTuple):
    """All names of a state, in order, with what tells their contents apart."""

    items: tuple[Item, ...]

    def pack(self) -> bytes:
        """The bytes that are hashed and sent."""
        packed: bytes = msgpack.packb([tuple(item) for item in self.items])
        return packed

    def outline(self) -> bytes:
        """Names, dtypes and shapes alone."""
        packed: bytes = msgpack.packb([(item.name, item.dtype, item.shape) for item in self.items])
        return packed


def unpack_manifest(data: bytes) -> Manifest:
    """The manifest that a peer has sent, and whose hash is right.

    Raises:
        WireError: it is none.
    """
    try:
        items = tuple(Item(*item) for item in msgpack.unpackb(data, use_list=False))
    except (ValueError, TypeError, msgpack.UnpackException) as e:
        raise WireError(f"a manifest makes no sense: {type(e).__name__}: {e}") from None
    for item in items:
        if not _is_sound(item):
            raise WireError("a manifest makes no sense")
    return Manifest(items)


def _is_sound(item: Item) -> bool:
    if not isinstance(item.name, str) or not isinstance(item.dtype, str) or type(item.nbytes) is not int or item.nbytes < 0:
        return False
    if not isinstance(item.shape, tuple) or any(type(n) is not int or n < 0 for n in item.shape):
        return False
    if not item.dtype:
        return item.content is None or isinstance(item.content, (bool, int, float, str, bytes))
    return item.content is None or (isinstance(item.content, bytes) and len(item.content) == item.blocks * HASH_BYTES)


def digest_of(data: Any) -> bytes:
    """xxh3-128 of bytes, or of an array of them."""
    digest: bytes = xxhash.xxh3_128_digest(data)
    return digest


class Snapshot:
    """This member's state: what it has under which name.

    Args:
        state: names -> tensors, or int, float, bool, str, bytes or None.
        may_differ: names of tensors that are not compared; newcomers get somebody's copy.

    Raises:
        InvalidArgument: a name or content is not allowed.
    """

    def __init__(self, state: Mapping[str, Any], may_differ: Sequence[str] = ()) -> None:
        if not isinstance(state, Mapping):
            raise InvalidArgument(f"state: a mapping of names to tensors and values is needed, not {type(state).__name__}")
        self.given = dict(state)
        self.tensors: dict[str, Memory] = {}
        self.values: dict[str, Any] = {}
        self.manifest = Manifest(())
        self.packed = b""
        self._packs: dict[str, npt.NDArray[np.uint8]] = {}
        for name, content in state.items():
            if not isinstance(name, str):
                raise InvalidArgument(f"state: its names have to be strings, not {name!r}")
            if content is None or isinstance(content, (bool, int, float, str, bytes)):
                self._add_value(name, content)
            else:
                self.tensors[name] = memory_of(content, f"state[{name!r}]", write=True)
        unknown = [name for name in may_differ if name in self.values]
        if unknown:
            raise InvalidArgument(f"may_differ: {unknown[0]!r} is a value; only tensors may differ")
        self.may_differ = frozenset(may_differ)

    def _add_value(self, name: str, value: Any) -> None:
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise InvalidArgument(f"state[{name!r}]: an integer of 64 bits is needed, not {value}")
        if isinstance(value, (str, bytes)) and len(value) > VALUE_BYTES:
            raise InvalidArgument(f"state[{name!r}]: {len(value)} long; up to {VALUE_BYTES} is a value, for more use a uint8 tensor")
        self.values[name] = value

    def hash(self) -> None:
        """Hash all tensors, in parallel, and make the manifest. May run in any thread; the tensors must not change meanwhile."""
        jobs = [(name, b) for name, t in self.tensors.items() if name not in self.may_differ for b in range(_blocks(t))]
        for name, tensor in self.tensors.items():
            if tensor.flat is None:
                self._packs[name] = packed = np.empty(tensor.nbytes, np.uint8)
                tensor.pack(packed.view(tensor.dtype.numpy))
        if len(jobs) > HASHERS:
            with ThreadPoolExecutor(HASHERS, thread_name_prefix="pccl-hash") as pool:
                hashes = list(pool.map(self._hash_block, jobs, chunksize=-(-len(jobs) // (4 * HASHERS))))
        else:
            hashes = [self._hash_block(job) for job in jobs]
        by_name: dict[str, list[bytes]] = {name: [] for name in self.tensors}
        for (name, _), value in zip(jobs, hashes, strict=True):
            by_name[name].append(value)
        items = [Item(name, "", (), 0, value) for name, value in self.values.items()]
        for name, t in self.tensors.items():
            content = None if name in self.may_differ else b"".join(by_name[name])
            items.append(Item(name, t.dtype.name, t.shapes[0] if len(t.shapes) == 1 else (t.count,), t.nbytes, content))
        self.manifest = Manifest(tuple(sorted(items, key=lambda item: item.name)))
        self.packed = self.manifest.pack()

    def _hash_block(self, job: tuple[str, int]) -> bytes:
        return digest_of(self.block(*job))

    def block(self, name: str, block: int) -> npt.NDArray[np.uint8]:
        """The bytes of a block, where they are (or, of a tensor that is not contiguous, were when it was hashed)."""
        memory = self.bytes_of(name)
        return memory[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes."""
        if name in self._packs:
            return self._packs[name]
        flat = self.tensors[name].flat
        assert flat is not None
        return flat.view(np.uint8)

    def finish(self, name: str) -> None:
        """New bytes were written to `bytes_of` a tensor: bring them to the caller's, if that is elsewhere."""
        if name in self._packs:
            tensor = self.tensors[name]
            tensor.unpack(self._packs[name].view(tensor.dtype.numpy))


def _blocks(tensor: Memory) -> int:
    return -(-tensor.nbytes // BLOCK_BYTES)
