"""What callers pass, as flat memory: numpy arrays, torch tensors, writable buffers, and lists of these."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from pccl.collectives.cuda import Gpu, Mark, gpu_of
from pccl.core.dtypes import DTYPES, DType, dtype_of
from pccl.core.errors import InvalidArgument

Array = npt.NDArray[Any]

_KINDS = "a numpy array, a torch CPU or CUDA tensor, a buffer (bytearray, array.array, memoryview, mmap), or a list of these"


class Memory:
    """The elements of one argument, in order: those of a tensor as its indices count, those of a list one tensor after the other.

    It is a view, nothing is copied. As long as it lives, so do the caller's objects, and a bytearray cannot be resized.
    """

    __slots__ = ("arrays", "count", "dtype", "flat", "given")

    given: Any
    """What the caller passed."""
    dtype: DType
    """Of all elements."""
    count: int
    """How many there are."""
    arrays: tuple[Array, ...]
    """A view of each tensor, of its shape and with any strides."""
    flat: Array | None
    """All elements as a 1-D array, if they lie one after the other (read-only where the caller's object is); else None, and they
    go through `pack` and `unpack`."""

    def __init__(self, given: Any, dtype: DType, arrays: tuple[Array, ...]) -> None:
        self.given = given
        self.dtype = dtype
        self.arrays = arrays
        if len(arrays) == 1:
            only = arrays[0]
            self.count: int = only.size
            self.flat = only.reshape(-1) if only.flags.c_contiguous else None
        else:
            self.count = sum([array.size for array in arrays])
            self.flat = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.count * self.dtype.itemsize

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each tensor."""
        return tuple([array.shape for array in self.arrays])

    def address(self, element: int = 0) -> int | None:
        """Where an element lies; None if they do not lie one after the other."""
        if len(self.arrays) != 1 or not self.arrays[0].flags.c_contiguous:
            return None
        start: int = self.arrays[0].__array_interface__["data"][0]
        return start + element * self.dtype.itemsize

    def hand_over(self) -> None:
        """The caller's thread makes its call now."""

    def pack(self, into: Array) -> None:
        """Copy all elements to a flat array of `count` elements."""
        for part, array in self._pairs(into):
            np.copyto(part, array)

    def unpack(self, source: Array) -> None:
        """Copy a flat array of `count` elements back to the tensors."""
        for part, array in self._pairs(source):
            np.copyto(array, part)

    def _pairs(self, flat: Array) -> Iterable[tuple[Array, Array]]:
        start = 0
        for array in self.arrays:
            yield flat[start : start + array.size].reshape(array.shape), array
            start += array.size

    def __str__(self) -> str:
        if len(self.arrays) != 1:
            return f"{self.dtype}[{self.count}] in {len(self.arrays)} tensors"
        return f"{self.dtype}[{'x'.join(map(str, self.arrays[0].shape))}]"


class DeviceMemory(Memory):
    """Likewise, on a GPU. The arrays only say where the elements lie: nobody may look at them. There is no `flat`."""

    __slots__ = ("gpu", "mark", "tensors")

    gpu: Gpu
    tensors: tuple[Any, ...]
    """Of torch"""
    mark: Mark
    """What the caller's stream had been given when the call was made: it comes first."""

    def __init__(self, given: Any, dtype: DType, arrays: tuple[Array, ...], tensors: tuple[Any, ...]) -> None:
        super().__init__(given, dtype, arrays)
        self.flat = None
        self.tensors = tensors
        self.gpu = gpu_of(tensors[0].device)

    def hand_over(self) -> None:
        """Note where the thread's current stream is."""
        self.mark = self.gpu.mark()

    def lend(self, other: DeviceMemory) -> None:
        """This is a new tensor, and goes to the caller that has handed over the other one."""
        self.mark = other.mark
        self.gpu.lend(self.given, self.mark)

    def pack(self, into: Array) -> None:
        """Copy all elements to a flat array, after what the caller's stream was given before; returns when that is done."""
        self.mark.event.synchronize()
        self.gpu.fetch(self.tensors, into.view(np.uint8)).synchronize()

    def unpack(self, source: Array) -> None:
        """Copy a flat array to the tensors, after what the caller's stream was given before; returns when that is done."""
        self.mark.event.synchronize()
        self.gpu.store(source.view(np.uint8), self.tensors).synchronize()


def memory_of(x: Any, name: str = "tensor", *, write: bool = False) -> Memory:
    """The memory of what a caller passed.

    Autograd is not told of what is written to a torch tensor.

    Args:
        x: a numpy array, torch tensor on the CPU or on a CUDA device, object with the buffer protocol, or a list or tuple of them with
            one dtype and on one device. Arrays and tensors may have any strides.
        name: the argument, for errors.
        write: whether it will be written to.

    Raises:
        InvalidArgument: it is something else, has elements of another type or of several, or is to be written to but is read-only
            or has elements that share memory.
    """
    if isinstance(x, (list, tuple)):
        if not x:
            raise InvalidArgument(f"{name}: an empty list; at least one tensor is needed")
        seen = [_array_of(item, f"{name}[{i}]", write) for i, item in enumerate(x)]
        dtype, device, arrays = seen[0][0], seen[0][2], tuple([array for _, array, _ in seen])
        for i, (other, _, there) in enumerate(seen):
            if other is not dtype:
                raise InvalidArgument(f"{name}: the tensors of a list must have one dtype; {name}[0] is {dtype}, {name}[{i}] is {other}")
            if there != device:
                both = f"{name}[0] is on {device or 'cpu'}, {name}[{i}] on {there or 'cpu'}"
                raise InvalidArgument(f"{name}: the tensors of a list must be on one device; {both}")
        if write and len(arrays) > 1 and _any_shared([(array, i) for i, array in enumerate(arrays)]):
            raise InvalidArgument(f"{name}: tensors of the list share memory; each needs its own to be written to")
        return Memory(x, dtype, arrays) if device is None else _on_device(x, dtype, arrays, tuple(x), name)
    dtype, array, device = _array_of(x, name, write)
    return Memory(x, dtype, (array,)) if device is None else _on_device(x, dtype, (array,), (x,), name)


def _on_device(x: Any, dtype: DType, arrays: tuple[Array, ...], tensors: tuple[Any, ...], name: str) -> Memory:
    try:
        return DeviceMemory(x, dtype, arrays, tensors)
    except InvalidArgument as e:
        raise InvalidArgument(f"{name}: {e}") from None


def allocate_like(x: Any, shape: int | Sequence[int], *, dtype: DType | None = None) -> Any:
    """A new tensor, uninitialised, of this shape and of x's dtype: a torch tensor on the same device if x (of a list the first) is one,
    else a numpy array. One on a GPU is for `Gpu.store`; it has to be lent to the stream of whoever gets it.

    Args:
        x: what `memory_of` accepts.
        shape: its shape, or its length.
        dtype: if not x's.
    """
    if isinstance(x, (list, tuple)):
        return allocate_like(x[0], shape, dtype=dtype)
    if _is_torch(x):
        torch = sys.modules["torch"]
        kind = getattr(torch, dtype.name) if dtype else x.dtype
        return torch.empty(shape, dtype=kind, device="cpu") if x.is_cpu else gpu_of(x.device).empty(shape, kind)
    if dtype:
        return np.empty(shape, dtype.numpy)
    return np.empty(shape, x.dtype if isinstance(x, np.ndarray) else memory_of(x).dtype.numpy)


# --- one tensor -----------------------------------------------------------------------------------------------------


def _array_of(x: Any, name: str, write: bool) -> tuple[DType, Array, Any]:
    """An array over the elements of one tensor, and their type, and their device if that is a GPU."""
    if type(x) is np.ndarray:
        array = x
    elif _is_torch(x):
        return _torch_array(x, name, write)
    elif isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise InvalidArgument(f"{name}: a masked array is given; give its data, or what filled() returns")
        array = np.asarray(x)
    else:
        array = _buffer_array(x, name)
    dtype = dtype_of(array.dtype, name)
    flags = array.flags
    if write:
        if not flags.writeable:
            raise InvalidArgument(f"{name}: a read-only {type(x).__name__} is given, and it would be written to; give a copy, or an out=")
        if not flags.c_contiguous:
            _check_strides(array, name)
    return dtype, array, None


def _buffer_array(x: Any, name: str) -> Array:
    try:
        view = memoryview(x)
    except TypeError:
        raise InvalidArgument(f"{name}: {type(x).__module__}.{type(x).__qualname__} is not supported; give {_KINDS}") from None
    try:
        return np.asarray(view)
    except (TypeError, ValueError, RuntimeWarning) as e:  # the last where warnings are errors
        raise InvalidArgument(f"{name}: a buffer of format {view.format!r} is not supported ({e})") from None


def _check_strides(array: Array, name: str) -> None:
    """Elements of an output have memory of their own, as far as can be told: no stride reaches back into what the smaller ones span."""
    span = array.itemsize
    for stride, length in sorted((abs(stride), length) for stride, length in zip(array.strides, array.shape, strict=True)):
        if length > 1:
            if stride < span:
                raise InvalidArgument(
                    f"{name}: elements share memory (shape {array.shape}, strides {array.strides}), and it would be written to; give a copy"
                )
            span += stride * (length - 1)


# --- torch ------------------------------------------------------------------------------------------------------------

_torch_dtypes: dict[Any, tuple[DType, str]] = {}  # torch dtype -> record, and numpy's name for its bits


class _Storage:
    """What numpy makes an array of: `Tensor.numpy()` would forbid to resize the storage for ever, which FSDP does.

    The array keeps this object, this the storage.
    """

    __slots__ = ("__array_interface__", "storage")

    def __init__(self, storage: Any, interface: dict[str, Any]) -> None:
        self.storage = storage
        self.__array_interface__ = interface


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, getattr(torch, "Tensor", ()))


def _torch_array(x: Any, name: str, write: bool) -> tuple[DType, Array, Any]:
    torch = sys.modules["torch"]
    if not _torch_dtypes:
        for record in DTYPES.values():
            if hasattr(torch, record.name):
                bits = "uint16" if record.name == "bfloat16" else record.name
                _torch_dtypes[getattr(torch, record.name)] = record, np.dtype(bits).str
    known = _torch_dtypes.get(x.dtype)
    plain = type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    here = x.is_cpu or x.is_cuda
    if known is None or not plain or not here or x.layout is not torch.strided or x.is_nested or x.is_neg() or x.is_conj():
        raise InvalidArgument(f"{name}: {_torch_fault(x, name, torch)}")
    dtype, bits = known
    shape, strides = tuple(x.shape), None
    if not x.is_contiguous():
        strides = tuple([dtype.itemsize * stride for stride in x.stride()])
    if 0 in shape:
        array = np.empty(shape, bits)  # there may be no address
    else:
        try:
            storage, data = x.untyped_storage(), (x.data_ptr(), False)
        except RuntimeError as e:  # within vmap, for example
            raise InvalidArgument(f"{name}: the tensor has no memory that can be reached ({e})") from None
        array = np.asarray(_Storage(storage, {"version": 3, "typestr": bits, "shape": shape, "strides": strides, "data": data}))
    if dtype.name == "bfloat16":
        array = array.view(dtype.numpy)
    if write and not array.flags.c_contiguous:
        _check_strides(array, name)
    return dtype, array, None if x.is_cpu else x.device


def _torch_fault(x: Any, name: str, torch: Any) -> str:
    """Why a tensor is refused, and what to do."""
    if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        hint = "; give its to_local()" if hasattr(x, "to_local") else ""
        return f"a {type(x).__name__} has no memory of its own that could be sent{hint}"
    if x.device.type == "meta":
        return "a meta tensor has no memory"
    if not (x.is_cpu or x.is_cuda):
        return f"a tensor on {x.device} is given, only CPU and CUDA tensors are supported; give {name}.cpu(), and copy the result back"
    if x.is_quantized:
        return f"a quantized tensor ({x.dtype}) is given; give {name}.dequantize()"
    if x.layout is not torch.strided or x.is_nested:
        return f"a {'nested' if x.is_nested else x.layout} tensor is given, only dense ones are supported; give its values"
    if x.dtype not in _torch_dtypes:
        return f"elements of type {x.dtype} are not supported; they can be {', '.join(DTYPES)}"
    lazy = "conj" if x.is_conj() else "neg"
    return f"the tensor is a lazy {lazy}() of another one's memory; give {name}.resolve_{lazy}()"


# --- overlap ------------------------------------------------------------------------------------------------------------


class Overlap(Enum):
    """How the memory of two arguments lies."""

    NONE = "disjoint"
    SAME = "the same memory, element by element"
    PARTIAL = "some of the memory is the same"


def overlap(a: Memory, b: Memory) -> Overlap:
    """How two arguments overlap: exact for contiguous tensors; of others it may say PARTIAL where elements only interleave."""
    if a.flat is not None and b.flat is not None and not np.may_share_memory(a.flat, b.flat):
        return Overlap.NONE
    if a.dtype is b.dtype and [_layout(x) for x in a.arrays] == [_layout(y) for y in b.arrays]:
        return Overlap.SAME if a.count else Overlap.NONE
    shared = _any_shared([(array, 0) for array in a.arrays] + [(array, 1) for array in b.arrays])
    return Overlap.PARTIAL if shared else Overlap.NONE


def _layout(array: Array) -> tuple[Any, ...]:
    """Equal for arrays whose elements are in the same places in the same order."""
    address = array.__array_interface__["data"][0] if array.size else 0
    return (address, array.size) if array.flags.c_contiguous else (address, array.shape, array.strides)


def _any_shared(arrays: list[tuple[Array, int]]) -> bool:
    """Whether two arrays with different numbers share memory."""
    spans = sorted([(*_span(array), number, i) for i, (array, number) in enumerate(arrays) if array.size])
    open_spans: list[tuple[int, int, int, int]] = []
    for span in spans:
        start, _, number, i = span
        open_spans = [other for other in open_spans if other[1] > start]
        if any(other[2] != number and _share(arrays[i][0], arrays[other[3]][0]) for other in open_spans):
            return True
        open_spans.append(span)
    return False


def _span(array: Array) -> tuple[int, int]:
    """First address, and the one after the last."""
    low = high = array.__array_interface__["data"][0]
    for stride, length in zip(array.strides, array.shape, strict=True):
        reach = stride * (length - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + array.itemsize


def _share(x: Array, y: Array) -> bool:
    """Whether arrays of overlapping spans share memory; True if that is too hard to tell."""
    try:
        return np.shares_memory(x, y, max_work=1000)  # type: ignore[arg-type]  # numpy's stubs know only -1 and 0
    except np.exceptions.TooHardError:
        return True
