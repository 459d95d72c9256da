import array
import ctypes
import gc
import mmap
import warnings
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pccl.collectives.tensors import Memory, Overlap, allocate_like, memory_of, overlap
from pccl.core.dtypes import DTYPES
from pccl.core.errors import InvalidArgument

Array = npt.NDArray[Any]


def ramp(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def round_trip(memory: Memory) -> Array:
    """What pack gives; and unpack brings back another content."""
    flat = np.empty(memory.count, memory.dtype.numpy)
    memory.pack(flat)
    memory.unpack(flat[::-1].copy())
    again = np.empty_like(flat)
    memory.pack(again)
    np.testing.assert_array_equal(again, flat[::-1])
    memory.unpack(flat)
    return flat


def refused(x: Any, *parts: str, write: bool = False, name: str = "out") -> None:
    with pytest.raises(InvalidArgument) as e:
        memory_of(x, name, write=write)
    text = str(e.value)
    assert text.startswith(name)
    for part in parts:
        assert part in text


# --- numpy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (3, 0, 2)])
def test_contiguous_arrays_are_not_copied(name: str, shape: tuple[int, ...]) -> None:
    x = np.zeros(shape, DTYPES[name].numpy)
    memory = memory_of(x, write=True)
    assert memory.dtype is DTYPES[name]
    assert memory.count == x.size
    assert memory.nbytes == x.nbytes
    assert memory.shapes == (shape,)
    assert memory.flat is not None
    assert memory.flat.shape == (x.size,)
    memory.flat[:] = 1
    assert (x == 1).all()
    assert str(memory) == f"{name}[{'x'.join(map(str, shape))}]"


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[::-1],
        lambda x: x[1:, 1:3, None],
        lambda x: np.lib.stride_tricks.as_strided(x, (3, 2), (8, 4)),
    ],
)
def test_other_strides_are_staged(view: Any) -> None:
    x = view(ramp(4, 6))
    shared = x.strides == (8, 4)
    memory = memory_of(x, write=not shared)
    if not x.flags.c_contiguous:
        assert memory.flat is None
    assert memory.shapes == (x.shape,)
    np.testing.assert_array_equal(round_trip(memory), x.ravel())


def test_contiguous_memory_can_be_packed_too() -> None:
    x = ramp(2, 3)
    np.testing.assert_array_equal(round_trip(memory_of(x)), x.ravel())


@pytest.mark.parametrize("x", [np.broadcast_to(np.ones(3), (2, 3)), b"abc", memoryview(b"abc"), np.float32(3)])
def test_read_only(x: Any) -> None:
    memory = memory_of(x)
    np.testing.assert_array_equal(memory.flat if memory.flat is not None else round_trip_read(memory), np.asarray(memoryview(x)).ravel())
    refused(x, f"a read-only {type(x).__name__} is given, and it would be written to", write=True)


def round_trip_read(memory: Memory) -> Array:
    flat = np.empty(memory.count, memory.dtype.numpy)
    memory.pack(flat)
    return flat


def test_subclasses() -> None:
    class Mine(np.ndarray):
        pass

    x = ramp(6)
    memory = memory_of(x.view(Mine), write=True)
    assert type(memory.flat) is np.ndarray
    memory.flat[0] = 9
    assert x[0] == 9
    refused(np.ma.masked_array(ramp(3), [False, True, False]), "masked", "filled()")


@pytest.mark.parametrize(
    "x", [np.array([object()]), np.zeros(2, [("a", "f4")]), np.zeros(2, "U3"), np.zeros(2, "M8[s]"), np.zeros(2, np.longdouble)]
)
def test_unsupported_elements(x: Array) -> None:
    refused(x, f"out: elements of type {x.dtype} are not supported; they can be float16, ")


def test_foreign_byte_order() -> None:
    refused(ramp(2).astype(np.dtype("f4").newbyteorder("S")), "byte order; convert it to float32")


@pytest.mark.parametrize("x", [None, 3, 0.5, "abc", {}, object(), np.float32, iter([])])
def test_no_tensors(x: object) -> None:
    kind = type(x)
    refused(x, f"out: {kind.__module__}.{kind.__qualname__} is not supported; give a numpy array, a torch CPU or CUDA tensor, a buffer (")


# --- outputs whose elements share memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (0, 4)), ((3, 2), (4, 4)), ((3,), (2,)), ((4, 4), (4, 8))])
def test_outputs_with_shared_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = np.lib.stride_tricks.as_strided(ramp(100), shape, strides)
    memory_of(x)
    refused(x, f"elements share memory (shape {shape}, strides {strides})", write=True)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    strides=st.lists(st.integers(-12, 12), min_size=3, max_size=3),
)
def test_no_shared_element_is_overlooked(shape: list[int], strides: list[int]) -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(201, np.int16)[100:], shape, [2 * s for s in strides[: len(shape)]])
    places = [sum(i * s for i, s in zip(index, strides, strict=False)) for index in np.ndindex(*shape)]
    if len(set(places)) < len(places):
        refused(x, "elements share memory", write=True)
    elif len(shape) == 1:
        memory_of(x, write=True)


def test_transposed_and_sliced_outputs_are_fine() -> None:
    x = ramp(4, 5, 6)
    for view in (x.T, x[::2, ::-1, 1:4], x.transpose(1, 2, 0)[::-2], x[:, :1], x[:1].T):
        memory_of(view, write=True)


# --- buffers ------------------------------------------------------------------------------------------------------------


def test_bytearray() -> None:
    x = bytearray(b"abcd")
    memory = memory_of(x, write=True)
    assert (memory.dtype.name, memory.count) == ("uint8", 4)
    assert memory.flat is not None
    memory.flat[0] = ord("x")
    assert x == b"xbcd"
    with pytest.raises(BufferError):
        x.append(1)
    del memory
    x.append(1)


@pytest.mark.parametrize("code", "bBhHiIlLqQfd")
def test_array_array(code: str) -> None:
    x = array.array(code, [1, 2, 3])
    memory = memory_of(x, write=True)
    assert memory.dtype.numpy == np.dtype(code)
    assert memory.flat is not None
    memory.flat[1] = 7
    assert x[1] == 7


def test_memoryviews() -> None:
    x: Any = ramp(4, 6)
    memory = memory_of(memoryview(x), write=True)
    assert memory.shapes == ((4, 6),)
    assert memory.flat is not None
    strided = memory_of(memoryview(x)[::2], write=True)
    assert strided.flat is None
    np.testing.assert_array_equal(round_trip(strided), x[::2].ravel())


def test_mmap_and_ctypes() -> None:
    with mmap.mmap(-1, 4096) as x:
        memory = memory_of(x, write=True)
        assert memory.flat is not None
        memory.flat[5] = 255
        assert x[5] == 255
        del memory
    doubles = (ctypes.c_double * 3)()
    assert memory_of(doubles, write=True).dtype.name == "float64"


def test_buffers_of_strange_formats() -> None:
    class Point(ctypes.Structure):
        _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_float))

    class Flags(ctypes.Structure):
        _fields_ = (("x", ctypes.c_int, 3), ("y", ctypes.c_int, 5))

    refused((Flags * 2)(), "not supported")
    refused(memoryview((ctypes.c_void_p * 2)()), "a buffer of format '<P' is not supported")
    refused((Point * 2)(), "elements of type", "are not supported; they can be float16")
    refused(array.array("u", "abc"), "elements of type <U1 are not supported")
    refused((ctypes.py_object * 2)(), "elements of type object are not supported")


# --- lists --------------------------------------------------------------------------------------------------------------


def test_lists_are_fused() -> None:
    a, b, c = ramp(2, 3), ramp(4, 4)[::2].T, np.array(5, np.float32)
    memory = memory_of([a, b, c], write=True)
    assert memory.flat is None
    assert (memory.count, memory.nbytes) == (15, 60)
    assert memory.shapes == ((2, 3), (4, 2), ())
    assert str(memory) == "float32[15] in 3 tensors"
    np.testing.assert_array_equal(round_trip(memory), np.concatenate([a.ravel(), b.ravel(), c.ravel()]))


def test_a_list_of_one_is_not_copied() -> None:
    x = ramp(3)
    memory = memory_of((x,), write=True)
    assert memory.flat is not None
    assert np.shares_memory(memory.flat, x)


def test_lists_that_are_refused() -> None:
    x = ramp(4)
    refused([], "an empty list")
    refused([x, ramp(4, dtype=np.float64)], "one dtype; out[0] is float32, out[1] is float64")
    refused([x, [x]], "out[1]: builtins.list is not supported")
    refused([x, 3.0], "out[1]: builtins.float is not supported")
    refused([ramp(2), b"abcd"], "out[1]: a read-only bytes", write=True)
    memory_of([x, x])
    refused([x, ramp(2), x], "share memory", write=True)
    refused([x[:3], x[2:]], "share memory", write=True)
    memory_of([x[:2], x[2:], x[:0]], write=True)
    memory_of([x[::2], x[1::2]], write=True)


# --- torch --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3)])
def test_tensors_are_not_copied(torch: Any, name: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=getattr(torch, name))
    memory = memory_of(x, write=True)
    assert memory.dtype is DTYPES[name]
    assert memory.shapes == (shape,)
    assert memory.flat is not None
    assert memory.flat.dtype == DTYPES[name].numpy
    assert memory.flat.flags.writeable
    memory.flat[:] = 1
    assert (x == 1).all()
    assert str(memory) == f"{name}[{'x'.join(map(str, shape))}]"


def test_bfloat16_both_ways(torch: Any) -> None:
    x = torch.tensor([1.0, -2.5, float("inf"), 3e-40], dtype=torch.bfloat16)
    flat = memory_of(x, write=True).flat
    assert flat is not None
    assert flat.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(flat.astype(np.float32), x.float().numpy())
    flat[:] = np.array([0.5, -0.0, 7, 1e38], ml_dtypes.bfloat16)
    assert x.tolist() == pytest.approx([0.5, -0.0, 7, 1e38], rel=2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_strided_tensors(torch: Any, dtype: str) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, dtype))
    for x in (base.permute(2, 0, 1), base[:, ::2, 1:], base[1:, 1]):
        memory = memory_of(x, write=True)
        assert (memory.flat is not None) == x.is_contiguous()
        want = x.flatten().to(torch.complex64).numpy()
        np.testing.assert_array_equal(round_trip(memory).astype(np.complex64), want)
    expanded = base[:1].expand(5, 3, 4)
    assert memory_of(expanded).count == 60
    refused(expanded, "elements share memory", write=True)


def test_parameters_and_graphs(torch: Any) -> None:
    leaf = torch.nn.Parameter(torch.zeros(3))
    flat = memory_of(leaf, write=True).flat
    assert flat is not None
    flat[0] = 5
    assert leaf.tolist() == [5, 0, 0]
    assert memory_of(leaf * 2).count == 3


def test_a_tensor_can_be_resized_afterwards(torch: Any) -> None:
    x = torch.zeros(10)
    memory = memory_of(x, write=True)
    del memory
    x.untyped_storage().resize_(0)  # FSDP frees its parameters so
    assert x.untyped_storage().size() == 0


def test_memory_outlives_the_tensor(torch: Any) -> None:
    x = torch.full((1000,), 3.0)
    flat = memory_of(x).flat
    assert flat is not None
    x.set_(torch.zeros(1).untyped_storage())
    del x
    gc.collect()
    torch.zeros(1000)
    assert (flat == 3).all()


def test_tensors_that_are_refused(torch: Any) -> None:
    x = torch.zeros(3)
    refused(torch.empty(3, device="meta"), "out: a meta tensor has no memory")
    refused(x.to_sparse(), "torch.sparse_coo tensor", "give its values")
    refused(torch.zeros(3, dtype=torch.complex64).conj(), "give out.resolve_conj()")
    refused(torch.zeros(3, dtype=torch.complex64).conj().imag, "give out.resolve_neg()")
    refused(torch.zeros(3, dtype=torch.float8_e4m3fn), "elements of type torch.float8_e4m3fn are not supported; they can be float16")
    with warnings.catch_warnings(action="ignore"):  # torch's: quantized tensors are on their way out
        refused(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "quantized", "give out.dequantize()")
    refused(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "NestedTensor")
    refused([torch.zeros(2), torch.zeros(2).double()], "out[0] is float32, out[1] is float64")
    refused([torch.zeros(2), x.to_sparse()], "out[1]: ")


def test_tensors_without_memory_of_their_own(torch: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(3)
    refused(fake, "a FakeTensor has no memory of its own")
    seen = []

    def mapped(x: Any) -> Any:
        with pytest.raises(InvalidArgument, match="no memory that can be reached"):
            memory_of(x)
        seen.append(x)
        return x

    torch.vmap(mapped)(torch.zeros(2, 3))
    assert seen


# --- results -------------------------------------------------------------------------------------------------------------


def test_allocate_like(torch: Any) -> None:
    for x, kind, dtype in [
        (ramp(3), np.ndarray, np.dtype(np.float32)),
        (ramp(2, 3).T.astype(ml_dtypes.bfloat16), np.ndarray, np.dtype(ml_dtypes.bfloat16)),
        (bytearray(4), np.ndarray, np.dtype(np.uint8)),
        (array.array("d", [1]), np.ndarray, np.dtype(np.float64)),
        ([ramp(3), ramp(4)], np.ndarray, np.dtype(np.float32)),
        (torch.zeros(3, dtype=torch.bfloat16), torch.Tensor, torch.bfloat16),
        ([torch.nn.Parameter(torch.zeros(3))], torch.Tensor, torch.float32),
    ]:
        for shape in (5, (5,), (2, 3), ()):
            made = allocate_like(x, shape)
            assert type(made) is kind
            assert made.dtype == dtype
            assert tuple(made.shape) == ((shape,) if isinstance(shape, int) else shape)
            assert memory_of(made, write=True).flat is not None
    assert allocate_like(ramp(3), 2, dtype=DTYPES["bfloat16"]).dtype == ml_dtypes.bfloat16
    assert allocate_like([torch.zeros(3)], 2, dtype=DTYPES["int8"]).dtype is torch.int8
    with torch.device("meta"):
        assert allocate_like(torch.zeros(3, device="cpu"), 3).device.type == "cpu"


# --- lifetime and overlap --------------------------------------------------------------------------------------------------


def test_memory_keeps_the_objects_alive() -> None:
    class Mine(np.ndarray):
        pass

    x = ramp(1000).view(Mine)
    watch = weakref.ref(x)
    memory = memory_of(x)
    assert memory.given is x
    del x
    gc.collect()
    assert watch() is not None
    del memory
    gc.collect()
    assert watch() is None


def between(a: Any, b: Any) -> Overlap:
    there, back = overlap(memory_of(a), memory_of(b)), overlap(memory_of(b), memory_of(a))
    assert there is back
    return there


def test_overlap() -> None:
    x, y = ramp(4, 6), ramp(4, 6)
    assert between(x, x) is Overlap.SAME
    assert between(x, x.reshape(-1)) is Overlap.SAME
    assert between(x.T, x.T) is Overlap.SAME
    assert between(x[::2], x[::2]) is Overlap.SAME
    assert between(x, y) is Overlap.NONE
    assert between(x[:2], x[2:]) is Overlap.NONE
    assert between(x[:, :3], x[:, 3:]) is Overlap.NONE
    assert between(x[:3], x[1:]) is Overlap.PARTIAL
    assert between(x, x[:2]) is Overlap.PARTIAL
    assert between(x, x.T) is Overlap.PARTIAL
    assert between(x, x[::-1]) is Overlap.PARTIAL
    assert between(x, x.view(np.int32)) is Overlap.PARTIAL
    assert between(x[:0], x[:0]) is Overlap.NONE
    assert between(x[:0], x) is Overlap.NONE


def test_overlap_of_lists() -> None:
    x, y, z = ramp(4), ramp(5), ramp(6)
    empty = ramp(0)
    assert between([x, y], [x, y]) is Overlap.SAME
    assert between([x, y, empty], [x, y, ramp(0)]) is Overlap.SAME
    assert between([x, y], [y, x]) is Overlap.PARTIAL
    assert between([x, y], [z, y]) is Overlap.PARTIAL
    assert between([x, y], y) is Overlap.PARTIAL
    assert between([x, x], z) is Overlap.NONE
    assert between([x, y], [z, z + 1]) is Overlap.NONE
    assert between([x], x) is Overlap.SAME


def test_overlap_with_torch(torch: Any) -> None:
    x = torch.zeros(6)
    assert between(x, x) is Overlap.SAME
    assert between(x, x.numpy()) is Overlap.SAME
    assert between(x.view(torch.int32), x.numpy().view(np.int32)) is Overlap.SAME
    assert between(x[:4], x[2:]) is Overlap.PARTIAL
    assert between(x[:3], x[3:]) is Overlap.NONE


slices = st.builds(slice, st.integers(0, 20), st.integers(0, 20), st.sampled_from([1, 1, 2, 3, -1]))


@given(a=st.lists(slices, min_size=1, max_size=4), b=st.lists(slices, min_size=1, max_size=4))
def test_overlap_of_slices(a: list[slice], b: list[slice]) -> None:
    x = ramp(20, dtype=np.int16)
    found = between([x[s] for s in a], [x[s] for s in b])
    left, right = [[i for s in some for i in range(20)[s]] for some in (a, b)]
    if not set(left) & set(right):
        assert found is Overlap.NONE
    elif [list(range(20)[s]) for s in a] == [list(range(20)[s]) for s in b]:
        assert found is Overlap.SAME
    else:
        assert found is Overlap.PARTIAL


def test_overlap_that_is_too_hard_to_tell() -> None:
    x = np.zeros(1 << 16, np.int8)
    a = np.lib.stride_tricks.as_strided(x, (5, 10, 7), (1426, 1263, 855))
    b = np.lib.stride_tricks.as_strided(x[50:], (9, 7, 5), (2844, 2139, 2887))
    assert not np.shares_memory(a, b)
    assert between(a, b) is Overlap.PARTIAL
