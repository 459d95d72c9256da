"""PyTorch's own tests of torch.distributed, on CPU tensors, with one backend: ``python -m tests.bindings.torch_suite pccl [PATTERN]``.

They are those of torch.testing._internal.distributed.distributed_test, which comes with torch, and need the package expecttest. They skip
backends that they do not know; so pccl is entered in their tables, and where they ask for gloo by name. Prints how each test has ended.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
import tempfile
import time
import unittest
from types import ModuleType
from typing import Any

BACKEND = "PCCL_SUITE_BACKEND"
SUITE = "torch.testing._internal.distributed.distributed_test"
WORLD = 3


class _Loader(importlib.machinery.SourceFileLoader):
    """The suite, with pccl wherever gloo is named in a condition."""

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        if path.endswith(".py"):
            text = data.decode()
            text = re.sub(r'BACKEND (==|!=) "gloo"', lambda m: f'BACKEND {"in" if m[1] == "==" else "not in"} ("gloo", "pccl")', text)
            data = text.replace('{"gloo"}', '{"gloo", "pccl"}').encode()
        return data

    def get_code(self, fullname: str) -> Any:
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True)  # not the one in the cache


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != SUITE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec
        assert spec.origin
        return importlib.util.spec_from_file_location(name, spec.origin, loader=_Loader(name, spec.origin))


def prepare(backend: str) -> type[unittest.TestCase]:
    """The suite's class for a backend."""
    os.environ.update(BACKEND=backend, WORLD_SIZE=str(WORLD), TEMP_DIR=tempfile.mkdtemp(), INIT_METHOD="env://")
    from torch.testing._internal import common_distributed as common

    common.DistTestCases.backend_feature["plugin"].add("pccl")
    tables = (common.DistTestCases.backend_feature, common.DistTestCases.skip_collective)
    for table in tables:
        for known in table.values():
            if "gloo" in known:
                known.add("pccl")
    sys.meta_path.insert(0, _Finder())
    import torch

    suite: Any = importlib.import_module(SUITE)

    class Suite(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc,name-defined]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)  # torch is imported once

    return Suite


class _Result(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, list[str]] = {}

    def stopTest(self, test: unittest.TestCase) -> None:
        name = test.id().rpartition(".")[2]
        outcome = ["passed", ""]
        for what, found in (("failed", self.failures), ("failed", self.errors), ("skipped", self.skipped)):
            if found and found[-1][0] is test:
                outcome = [what, found[-1][1]]
        self.ended[name] = outcome
        last = [line for line in outcome[1].strip().splitlines() if line.strip()]
        print(f"{outcome[0]:8} {name}  {last[-1][:160] if last else ''}", flush=True)


def main() -> None:
    """Run the suite."""
    backend, pattern = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    suite = prepare(backend)
    names = [name for name in unittest.TestLoader().getTestCaseNames(suite) if re.search(pattern, name)]
    began, result = time.monotonic(), _Result()
    unittest.TestSuite(suite(name) for name in names).run(result)
    counts = {what: sum(outcome[0] == what for outcome in result.ended.values()) for what in ("passed", "failed", "skipped")}
    print(f"{backend}: {counts}, {time.monotonic() - began:.0f} s")
    with open(f"torch-suite-{backend}.json", "w") as file:
        json.dump(result.ended, file, indent=1)


if __name__ == "__main__":
    main()
