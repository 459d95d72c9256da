import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from pccl.core.dtypes import DTYPES, LEGAL, ReduceOp, dtype_named, dtype_of, premul_sum, reduce_op
from pccl.core.errors import InvalidArgument

OPS = ["sum", "avg", "prod", "min", "max", "band", "bor", "bxor", "premul_sum"]
FLOAT = "sum avg prod min max premul_sum"
INTEGER = "sum prod min max band bor bxor"
COMPLEX = "sum avg prod premul_sum"
TABLE = {
    "float16": FLOAT,
    "bfloat16": FLOAT,
    "float32": FLOAT,
    "float64": FLOAT,
    "int8": INTEGER,
    "int16": INTEGER,
    "int32": INTEGER,
    "int64": INTEGER,
    "uint8": INTEGER,
    "uint16": INTEGER,
    "uint32": INTEGER,
    "uint64": INTEGER,
    "bool": "min max band bor bxor",
    "complex64": COMPLEX,
    "complex128": COMPLEX,
}


def given(op: str) -> str | ReduceOp:
    return premul_sum(0.5) if op == "premul_sum" else op


def test_the_table_is_complete() -> None:
    assert list(DTYPES) == list(TABLE)
    assert list(LEGAL) == OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", TABLE)
def test_pairs(dtype: str, op: str) -> None:
    if op in TABLE[dtype].split():
        assert reduce_op(given(op), DTYPES[dtype]).name == op
        return
    with pytest.raises(InvalidArgument) as e:
        reduce_op(given(op), DTYPES[dtype], "operator")
    text = str(e.value)
    assert text.startswith(f"operator: {op!r} is not defined on {dtype}")
    assert text.endswith(f"{dtype} allows {', '.join(TABLE[dtype].split())}")


@pytest.mark.parametrize(("op", "dtype", "advice"), [("sum", "bool", "'bor'"), ("prod", "bool", "'band'"), ("avg", "int8", "divide")])
def test_advice(op: str, dtype: str, advice: str) -> None:
    with pytest.raises(InvalidArgument, match=advice):
        reduce_op(op, DTYPES[dtype])


@pytest.mark.parametrize("op", ["SUM", "mean", "", None, 3, np.add, [], ReduceOp("mean")])
def test_unknown_operators(op: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^op: .* is no operator; it can be 'sum', .*'bxor' or pccl\.premul_sum\(factor\)$"):
        reduce_op(op, DTYPES["float32"])  # type: ignore[arg-type]


def test_premul_sum_without_a_factor() -> None:
    with pytest.raises(InvalidArgument, match=r"needs a factor; give pccl\.premul_sum"):
        reduce_op("premul_sum", DTYPES["float32"])


@pytest.mark.parametrize("factor", [0, 2, -0.25, np.float32(0.5), np.int64(3), 1e300])
def test_factors(factor: float) -> None:
    op = premul_sum(factor)
    assert (op.name, op.factor) == ("premul_sum", float(factor))


@pytest.mark.parametrize("factor", ["0.5", None, True, 1j, np.complex64(1), float("nan"), float("inf"), 10**400, np.zeros(2), [1.0]])
def test_no_factors(factor: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^factor: a finite real number is needed, not "):
        premul_sum(factor)  # type: ignore[arg-type]


def test_operators_as_text() -> None:
    assert str(reduce_op("avg", DTYPES["float32"])) == "avg"
    assert str(premul_sum(0.5)) == "premul_sum(0.5)"


@pytest.mark.parametrize("name", TABLE)
def test_records(name: str) -> None:
    record = dtype_named(name)
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    assert record is DTYPES[name] is dtype_of(dtype) is dtype_of(np.zeros(1, dtype).dtype)
    assert record.numpy == dtype
    assert record.itemsize == dtype.itemsize
    assert record.half == (name in ("float16", "bfloat16"))
    assert str(record) == name
    assert pickle.loads(pickle.dumps(record)) is record


def test_equal_numpy_dtypes_have_one_record() -> None:
    assert dtype_of(np.dtype("longlong")) is dtype_of(np.dtype("long")) is DTYPES["int64"]
    assert dtype_of(np.dtype("=f4")) is DTYPES["float32"]


@pytest.mark.parametrize("name", ["float128", "f4", "str", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^dtype: .* is not supported; it can be float16, "):
        dtype_named(name)


@pytest.mark.parametrize(
    "dtype", [object, "U3", "S1", "V8", "M8[s]", "longdouble", [("a", "f4"), ("b", "i4")], ml_dtypes.float8_e4m3fn, ml_dtypes.int4]
)
def test_unsupported_elements(dtype: object) -> None:
    made = np.dtype(dtype)  # type: ignore[call-overload]
    with pytest.raises(InvalidArgument) as e:
        dtype_of(made, "out")
    assert str(e.value).startswith(f"out: elements of type {made} are not supported; they can be float16, ")


@pytest.mark.parametrize("code", ["f4", "i8", "c16"])
def test_foreign_byte_order(code: str) -> None:
    swapped = np.dtype(code).newbyteorder("S")
    with pytest.raises(InvalidArgument) as e:
        dtype_of(swapped)
    assert str(e.value) == f"tensor: {swapped.str!r} is not in this machine's byte order; convert it to {np.dtype(code).name}"


def test_ml_dtypes_is_loaded_when_it_is_needed() -> None:
    code = """
import sys
from pccl.core import dtypes
from pccl.collectives import reduction, tensors
import numpy as np
tensors.memory_of(np.zeros(3, np.float16))
assert "ml_dtypes" not in sys.modules and "torch" not in sys.modules
dtypes.DTYPES["bfloat16"].numpy
assert "ml_dtypes" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
