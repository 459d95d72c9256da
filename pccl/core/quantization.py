"""How the elements of a call are made smaller for the wire, as its caller says it. The arithmetic is in `pccl.collectives.quantize`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from pccl.core.dtypes import DType, ReduceOp
from pccl.core.errors import InvalidArgument

SCALED = ("uint8", "int8", "uint4")
"""Kinds with a scale for each block of elements."""
KINDS = (*SCALED, "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")
OPERATORS = ("sum", "avg", "premul_sum", "min", "max")
"""Operators whose results have an error that is a sum, or the largest, of those of the inputs."""
LEAST_BLOCK, LARGEST_BLOCK = 16, 1 << 14


@dataclass(frozen=True, slots=True)
class Quantization:
    """What travels in place of the elements. All members of a call give the same.

    Raises:
        InvalidArgument: one of the values is none of those below.
    """

    kind: str
    """"uint8" (from the least to the largest value of a block), "int8" (symmetric about 0), "uint4" (as uint8, two in a byte), "bfloat16"
    or "float16"."""
    _: KW_ONLY
    block: int = 512
    """Elements that share a scale: a multiple of 16 from 16 to 16,384. Smaller blocks are more precise and take more bytes: a scale
    has 8, int8's 4. bfloat16 and float16 have none."""
    rounding: str = "nearest"
    """"nearest", or "stochastic": up or down by chance, so that the expected value is that of the element."""
    seed: int = 0
    """Of the chance, from 0 to 2**63 - 1. A call that is repeated with the same seed, inputs and members gives the same bits: for errors
    that are independent from one call to the next, give each another one, such as the number of the step."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"quantize: {self.kind!r} is no kind of quantization; there are {', '.join(KINDS)}")
        if self.rounding not in ROUNDINGS:
            raise InvalidArgument(f"rounding: {self.rounding!r} is none; there are {', '.join(ROUNDINGS)}")
        for name, value, least, largest in (("block", self.block, LEAST_BLOCK, LARGEST_BLOCK), ("seed", self.seed, 0, (1 << 63) - 1)):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
                raise InvalidArgument(f"{name}: an integer from {least} to {largest} is needed, not {value!r}")
        if self.block % LEAST_BLOCK:
            raise InvalidArgument(f"block: a multiple of {LEAST_BLOCK} is needed, not {self.block}")

    @property
    def stochastic(self) -> bool:
        """Whether elements are rounded by chance."""
        return self.rounding == "stochastic"

    def __str__(self) -> str:
        traits = [f"block={self.block}"] if self.kind in SCALED else []
        if self.stochastic:
            traits += ["stochastic", f"seed={self.seed}"]
        return f"{self.kind}({', '.join(traits)})" if traits else self.kind


def quantization(given: object, dtype: DType, op: ReduceOp | None = None) -> Quantization | None:
    """What a caller gave as `quantize`, checked against the tensor's dtype and the operator.

    Raises:
        InvalidArgument: it is no quantization, or not one for these.
    """
    if given is None:
        return None
    if not isinstance(given, (str, Quantization)):
        raise InvalidArgument(f"quantize: one of {', '.join(KINDS)}, a pccl.Quantization or None is needed, not {given!r}")
    if dtype.kind != "float":
        raise InvalidArgument(f"quantize: it is for float16, bfloat16, float32 and float64; x is {dtype}")
    if op is not None and op.name not in OPERATORS:
        raise InvalidArgument(f"quantize: errors of {op.name!r} have no bound; quantized calls can have {', '.join(OPERATORS)}")
    return Quantization(given) if isinstance(given, str) else given
