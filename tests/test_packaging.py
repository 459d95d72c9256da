"""The shape of the package: layers, exports, documentation, what an import costs, and what a distribution holds."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import pccl

ROOT = Path(__file__).parent.parent
FOLDERS = ("bindings", "collectives", "tools", "topology", "transports")
"""They stand at the top, and are imported as pccl.*."""
LAYERS = {
    "pccl.core": 0,
    "pccl.protocol": 1,
    "pccl.transports": 1,
    "pccl.topology": 2,
    "pccl.collectives": 3,
    "pccl": 4,
    "pccl.bindings": 5,
    "pccl.tools": 5,
}
STRANGERS = {"pccl.protocol", "pccl.transports"}
"""On one layer, and yet not to know each other."""


# --- layers -----------------------------------------------------------------------------------------------------------


def modules() -> Iterator[tuple[str, Path]]:
    """All modules and their files."""
    for folder in ("pccl/core", "pccl/protocol", *FOLDERS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield _module(path), path
    for path in sorted((ROOT / "pccl").glob("*.py")):
        yield _module(path), path


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "pccl":
        parts.insert(0, "pccl")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the library, as LAYERS names it, that a module belongs to."""
    two = ".".join(module.split(".")[:2])
    return two if two in LAYERS else "pccl"


def imports(source: str, module: str, *, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Modules of pccl that a source imports, in functions and for type checkers too, and whether it does so relatively."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names if alias.name.split(".")[0] == "pccl")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            if base.split(".")[0] == "pccl":
                for alias in node.names:  # `from pccl import tools` imports pccl.tools
                    full = f"{base}.{alias.name}"
                    yield (full if full in LAYERS else base), bool(node.level)


def breaches(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module imports though it must not."""
    mine, found = part_of(module), []
    for target, relative in imports(source, module, is_package=is_package):
        theirs = part_of(target)
        if LAYERS[theirs] > LAYERS[mine]:
            found.append(f"{module} imports {target}, which is above it")
        if {mine, theirs} == STRANGERS:
            found.append(f"{module} imports {target}: the two sides of layer 1 do not know each other")
        if relative and mine != theirs:
            found.append(f"{module} imports {target} relatively, across folders")
    return found


def test_layers() -> None:
    found = [b for name, path in modules() for b in breaches(path.read_text(), name, is_package=path.name == "__init__.py")]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pccl.core.types", "import pccl"),
        ("pccl.core.types", "def f():\n    from pccl.protocol.group import Group"),
        ("pccl.protocol.group", "from pccl.transports.base import Origin"),
        ("pccl.transports.tcp", "import pccl.protocol.group"),
        ("pccl.collectives.flow", "from pccl import engine"),
        ("pccl.engine", "from pccl import tools"),
        ("pccl.engine", "from .tools import cli"),
        ("pccl.collectives.schedules.ring", "from ...core import types"),
    ],
)
def test_layer_test_finds(module: str, source: str) -> None:
    assert breaches(source, module)


def test_layer_test_knows_all_modules() -> None:
    names = {name for name, _ in modules()}
    assert {"pccl", "pccl.engine", "pccl.core.errors", "pccl.tools.cli", "pccl.collectives.schedules.ring"} <= names


# --- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pccl.__all__)
def test_export_is_there_and_documented(name: str) -> None:
    found = getattr(pccl, name)
    if not isinstance(found, int):
        assert inspect.getdoc(found)


def test_exports_are_sorted_and_complete() -> None:
    constants, classes, rest = [], [], []
    for name in pccl.__all__:
        (constants if name.isupper() else classes if name[0].isupper() else rest).append(name)
    assert pccl.__all__ == [*sorted(constants), *sorted(classes), *sorted(rest)]
    errors = importlib.import_module("pccl.core.errors")
    tree = {name for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, pccl.PcclError)}
    assert tree <= set(pccl.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pccl.no_such_name


def _public_methods() -> Iterator[tuple[str, object]]:
    classes = [found for name in pccl.__all__ if inspect.isclass(found := getattr(pccl, name))]
    for cls in (*classes, pccl.sync.Communicator, pccl.sync.Work, pccl.sync.SyncRound):
        for name, found in inspect.getmembers(cls):
            home = next((base for base in cls.__mro__ if name in vars(base)), cls)
            if not name.startswith("_") and home.__module__.startswith("pccl") and (callable(found) or isinstance(found, property)):
                yield f"{cls.__module__}.{cls.__qualname__}.{name}", found


def test_public_methods_are_documented() -> None:
    assert [name for name, found in _public_methods() if not inspect.getdoc(found)] == []


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_import_is_light() -> None:
    """What takes time to import, or starts anything, comes with its first use: of pccl itself only layer 0, of others numpy and xxhash."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import pccl\n"
        "added = set(sys.modules) - before\n"
        "print(*sorted(m for m in added if m.split('.')[0] == 'pccl'))\n"
        "tops = {m.split('.')[0] for m in added} - sys.stdlib_module_names - {'pccl'}\n"
        "print(*sorted(tops))\n"
        "print(*sorted({'asyncio', 'concurrent.futures', 'multiprocessing', 'socket', 'ssl'} & added))\n"
    )
    mine, others, slow = _run([sys.executable, "-c", code], cwd=ROOT).splitlines()
    assert [m for m in mine.split() if m != "pccl" and part_of(m) != "pccl.core"] == []
    assert set(others.split()) == {"numpy", "xxhash"}
    assert slow == ""


@pytest.mark.process
@pytest.mark.parametrize("command", ["--help", "version", "keys --help"])
def test_small_commands_are_light(command: str) -> None:
    """Nobody waits for a library that a command does not use."""
    code = (
        "import sys\n"
        "from pccl.tools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'torch', 'matplotlib', 'uvloop', 'pccl.engine'} & set(sys.modules)))\n"
    )
    assert _run([sys.executable, "-c", code, *command.split()], cwd=ROOT).splitlines()[-1] == ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_name_is_refused(folder: str) -> None:
    with pytest.raises(ImportError, match=rf"import pccl\.{folder}"):
        importlib.import_module(folder)
    assert importlib.import_module(f"pccl.{folder}").__doc__


# --- distributions ----------------------------------------------------------------------------------------------------


def test_pyproject_names_every_package() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for _, path in modules()} | {ROOT / "tools/data/mnist"}
    found = {"pccl" if folder.name == "pccl" else _module(folder / "__init__.py"): folder for folder in folders}
    assert set(tables["packages"]) == set(found)
    for name, folder in found.items():
        if folder.relative_to(ROOT).parts[0] != "pccl":
            assert ROOT / tables["package-dir"][name] == folder


def _run(command: list[str], *, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _build(source: Path, target: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    _run([sys.executable, "-c", code], cwd=source)
    return next(target.iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution, made from a copy: building leaves things about."""
    copy = tmp_path_factory.mktemp("copy") / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*cache", ".hypothesis", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    packed = _build(copy, tmp_path_factory.mktemp("sdist"), "sdist")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(packed) as file:
        file.extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, made from the source distribution."""
    return _build(sdist, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.mark.process
def test_sdist_works_without_links(sdist: Path, tmp_path: Path) -> None:
    """As a checkout on a system that has no symbolic links does."""
    assert not (sdist / "pccl/tools").exists()
    code = "import pccl.tools.cli, pccl.collectives.schedules.ring; print(pccl.__file__, pccl.tools.cli.__file__)"
    files = _run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(sdist)).split()
    assert [Path(file).relative_to(sdist).as_posix() for file in files] == ["pccl/__init__.py", "tools/cli.py"]


@pytest.mark.process
def test_wheel_holds_all_modules_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    data = {f"pccl/tools/data/mnist/{path.name}" for path in (ROOT / "tools/data/mnist").iterdir()}
    files = {name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py") for name, path in modules()}
    assert names == files | data | {"pccl/py.typed"}


@pytest.mark.process
def test_wheel_works(wheel: Path, tmp_path: Path) -> None:
    home, empty = tmp_path / "home", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as file:  # what pip does, without pip: not every environment has one
        file.extractall(home)
    code = "import pccl.tools.demo.data as d; print(d.__file__); print(d.load().images.shape)"
    where, shape = _run([sys.executable, "-c", code], cwd=empty, PYTHONPATH=str(home)).splitlines()
    assert Path(where).is_relative_to(home)
    assert shape == "(8000, 784)"
    assert "demo" in _run([sys.executable, "-m", "pccl.tools", "--help"], cwd=empty, PYTHONPATH=str(home))
    (entry_points,) = home.glob("*.dist-info/entry_points.txt")
    assert "pccl = pccl.tools.cli:main" in entry_points.read_text()
