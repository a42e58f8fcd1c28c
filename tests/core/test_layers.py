"""The arrows between the modules: edge -> shell -> pure, never back (design: "Layout")."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import iohang_fuse

PACKAGE = Path(iohang_fuse.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)

PURE = {"events", "inodes", "messages", "mountwords", "ordering", "pagecache", "qmp", "rehandle", "status", "tally",
        "throttle", "writelog"}  # fmt: skip
PURE |= {"mounttable", "toptable", "doctor.examination", "doctor.facts", "doctor.findings", "doctor.nfs", "doctor.of_source",
         "doctor.qemu"}  # fmt: skip
EDGE = {"cli", "ctl", "doctor.check", "exposition", "filesystem", "flaky", "monitor", "mount", "receiver", "top",
        "umount"}  # fmt: skip
SHELL = {*MODULES} - PURE - EDGE

IMPURE = {"asyncio", "concurrent", "io", "os", "pathlib", "pyfuse3", "random", "select", "signal", "socket", "subprocess",
          "threading", "time", "trio"}  # fmt: skip
WORDS_OF_OS = {"strerror", "fsencode", "fsdecode"}  # tables and spellings: no system call
FUSE = {"filesystem", "mount", "flaky", "receiver"}  # flaky is a second file system, the tests' and rehearsals' own


def tree(module: str) -> ast.Module:
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


def imports(module: str) -> set[str]:
    """Everything that *module* imports, for its types too: `trio`, or `iohang_fuse.events`."""
    found = set()
    for node in ast.walk(tree(module)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module="iohang_fuse" | "iohang_fuse.doctor" as name, names=names):
                found |= {f"{name}.{alias.name}" for alias in names}
            case ast.ImportFrom(module=str(name), level=0):
                found.add(name)
            case ast.ImportFrom():
                raise AssertionError(f"{module}: imports are absolute")
    return found


def ours(module: str) -> set[str]:
    """The modules of this package that *module* imports."""
    names = (name.removeprefix("iohang_fuse.") for name in imports(module) if name.startswith("iohang_fuse."))
    return {name for name in names if name in MODULES}


def others(module: str) -> set[str]:
    """The top-level names that *module* imports from elsewhere."""
    return {name.split(".")[0] for name in imports(module)} - {"iohang_fuse"}


def attributes_of_os(module: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    }


def test_the_modules_named_here_are_there() -> None:
    """A rule for a module that is gone, or called otherwise by now, would hold nobody."""
    assert (PURE | EDGE | FUSE) - {*MODULES} == set()
    assert PURE.isdisjoint(EDGE)


@pytest.mark.parametrize("module", [module for module in MODULES if module in PURE])
def test_pure_modules_know_no_world(module: str) -> None:
    """Pure: no trio, no os, no pyfuse3, no clock; `now` is an argument and events are return values."""
    worldly = others(module) & IMPURE
    if attributes_of_os(module) <= WORDS_OF_OS:
        worldly.discard("os")
    assert worldly == set()
    assert others(module) <= sys.stdlib_module_names
    assert ours(module) <= PURE


@pytest.mark.parametrize("module", sorted(SHELL))
def test_the_shell_does_not_know_the_edge(module: str) -> None:
    """Imports point downwards: edge -> shell -> pure, never back."""
    assert ours(module) & EDGE == set()


@pytest.mark.parametrize("module", MODULES)
def test_pyfuse3_stays_at_the_edge(module: str) -> None:
    """pyfuse3 is imported where a file system is, and where it is mounted, only."""
    assert "pyfuse3" not in others(module) or module in FUSE


def test_only_declared_dependencies_are_imported() -> None:
    """Each dependency has its reason in pyproject.toml; nothing else is imported."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    declared = {
        requirement.split(">")[0].replace("pyyaml", "yaml").replace("qemu.qmp", "qemu")
        for requirement in project["project"]["dependencies"]
    }
    used = set().union(*(others(module) for module in MODULES)) - sys.stdlib_module_names
    assert used <= declared


def test_no_module_imports_itself_through_others() -> None:
    """No circles: each module can be read knowing those below it alone."""
    left = {module: ours(module) for module in MODULES}
    while left:
        lowest = {module for module, needs in left.items() if not needs & left.keys()}
        assert lowest, f"a circle among {sorted(left)}"
        for module in lowest:
            del left[module]


def test_iohangctl_starts_light() -> None:
    """A check that runs each minute needs neither a file system, nor an event loop for one, nor a screen."""
    program = "import sys, iohang_fuse.ctl; print(*({'trio', 'pyfuse3', 'rich'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
