"""docs/ as Sphinx builds it, and the manual pages as man(1) shows them and the package brings them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PAGES = {*(f"{program}.8" for program in PROGRAMS), "iohang.yaml.5"}
FROM_THE_TREE = ("docs", "iohang_fuse", "pyproject.toml", "setup.py", "MANIFEST.in", "README.rst", "LICENSE")


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """*command* with *more* in its environment; its output is what a failure shows."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env={**os.environ, **more}
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def sphinx(builder: str, docs: Path, place: Path) -> Path:
    run(
        *(sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-E"),
        *("-d", place / "doctrees", "-b", builder, docs, place / builder),
    )
    return place / builder


@pytest.fixture(scope="module")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sphinx("man", ROOT / "docs", tmp_path_factory.mktemp("docs"))


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    """Sphinx has no warning: references, links between pages, headings and tables are right, and each page is in the index."""
    html = sphinx("html", ROOT / "docs", tmp_path)
    for page in (ROOT / "docs").rglob("*.rst"):
        assert html.joinpath(page.relative_to(ROOT / "docs")).with_suffix(".html").exists()
    assert 'href="limitations.html#fsync-and-close"' in (html / "howto/libvirt.html").read_text().replace("../", "")


@pytest.mark.parametrize("link", ["gone.rst", "semantics.rst#gone", "../README.rst"])
def test_a_link_to_nothing_is_a_warning(tmp_path: Path, link: str) -> None:
    """docs/conf.py: a link "warns where there is no such page, file or heading"."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1"\n')
    (docs / "conf.py").write_text((ROOT / "docs/conf.py").read_text() + "\nman_pages = []\n")
    (docs / "semantics.rst").write_text(":orphan:\n\nSemantics\n=========\n")
    (tmp_path / "example").write_text("an example")
    (docs / "index.rst").write_text("Index\n=====\n\n`good <semantics.rst#semantics>`_ `file <../example>`_\n")
    html = sphinx("html", docs, tmp_path)
    assert [file.read_text() for file in html.glob("_downloads/*/example")] == ["an example"]
    (docs / "index.rst").write_text(f"Index\n=====\n\n`bad <{link}>`_\n")
    with pytest.raises(AssertionError, match="WARNING"):
        sphinx("html", docs, tmp_path)


def test_the_manual_pages_have_no_warnings(manual: Path) -> None:
    """Groff reads each manual page without a warning, and it has the sections that a page has."""
    assert {page.name for page in manual.glob("*.[1-9]")} == PAGES
    for page in manual.glob("*.[1-9]"):
        done = run("man", "--warnings", "-E", "UTF-8", "-l", page, MANROFFSEQ="", MANWIDTH="80", LC_ALL="C.UTF-8")
        assert done.stderr == "", page.name
        sections = [line for line in done.stdout.splitlines() if line and line == line.strip() == line.upper()]
        assert {"NAME", "SYNOPSIS", "DESCRIPTION", "SEE ALSO"} <= {*sections}, page.name


def test_the_package_brings_its_manual_pages(tmp_path: Path) -> None:
    """Pip builds the manual pages from a clean tree, and installs them where man(1) finds them beside the programs."""
    tree = tmp_path / "tree"
    tree.mkdir()
    run("cp", "-a", *(ROOT / name for name in FROM_THE_TREE), tree)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        brought = {Path(name).name for name in archive.namelist() if "/data/share/man/" in name}
    assert brought == PAGES
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "usr")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        tmp_path / "usr/bin/python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    )
    for page in PAGES:
        name, section = page.rsplit(".", 1)
        found = run("man", "-w", section, name, PATH=f"{tmp_path / 'usr/bin'}:/usr/bin:/bin", MANPATH="").stdout
        assert found.strip() == str(tmp_path / f"usr/share/man/man{section}/{page}")


def test_an_editable_install_brings_them_too() -> None:
    """contrib/setup, which installs so, links them to where man(1) looks: they are below this environment's prefix."""
    assert {page.name for page in Path(sys.prefix, "share/man").glob("man[58]/*")} >= PAGES
