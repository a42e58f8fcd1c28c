"""CPython's own tests of files, on the mount and on SOURCE itself: what passes there passes here.

The suite is Debian's, for Debian's Python, whichever Python runs this file. Debian leaves `test_sqlite3` out of it (a package
within the package `test`), so that one is taken from the Debian source package of the same version.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import Mount

PYTHON = "/usr/bin/python3.11"
STDLIB = Path("/usr/lib/python3.11")
PACKAGE_OF = {
    "os.py": "python3.11",
    "test/test_os.py": "libpython3.11-testsuite",
    "lib-dynload/_gdbm.*.so": "python3-gdbm",
}
MODULES = (
    "test_os",
    "test_posix",
    "test_io",
    "test_fileio",
    "test_mmap",
    "test_largefile",
    "test_shutil",
    "test_pathlib",
    "test_tempfile",
    "test_glob",
    "test_sqlite3",
    "test_dbm",
    "test_dbm_dumb",
    "test_dbm_gnu",
    "test_dbm_ndbm",
    "test_mailbox",
    "test_fcntl",
    "test_stat",
)
# Where it matters who asks: as root, these skip or cannot see most questions of permission.
MODULES_OF_USERS = ("test_os", "test_posix", "test_shutil", "test_pathlib", "test_tempfile")
# The second copy of 2.5 GB; test_largefile.TestCopyfile is the first, beyond 2 GiB as well.
IGNORED = ("--ignore=test.test_largefile.TestSocketSendfile.*",)
# Thousands of look-ups of deep paths, and SOURCE may be asked about each name each time: minutes.
IGNORED_OF_USERS = ("--ignore=*many_open_files*", "--ignore=*fd_leak*")

# Name -> cause, for what passes on SOURCE and cannot pass above FUSE. One that passes after all is an error here.
EXCEPTIONS: dict[str, str] = {}


@dataclass(frozen=True)
class Run:
    """What one run of the suite found; *failures* has setUpClass and the like as well."""

    passed: frozenset[str]
    failures: frozenset[str]
    output: str

    def excerpt(self, name: str) -> str:
        """What the suite says of *name*: its traceback, or the line on which it is skipped."""
        traceback = rf"^(?:FAIL|ERROR): \S+ \({re.escape(name)}\).*?(?=^$|^[=-]{{70}}\n(?!Traceback))"
        line = rf"^[^\n]*\({re.escape(name)}\) \.\.\.[^\n]*"
        for pattern in (traceback, line):
            if found := re.search(pattern, self.output, re.DOTALL | re.MULTILINE):
                return found[0]
        return f"{name}: its module did not load, or crashed"


def run_suite(where: Path, report: Path, *arguments: str, path: Path | None = None, user: str | None = None) -> Run:
    """Run regrtest with *where* as the directory of all temporary files, as *user*; *path* is a PYTHONPATH."""
    where.mkdir()
    report.mkdir()
    if user is not None:
        for directory in (where, report):
            shutil.chown(directory, user)
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(report), "TMPDIR": str(where)}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [
            PYTHON,
            "-m",
            "test",
            "-v",
            "-j2",
            "--use=largefile,subprocess",
            "--timeout=300",
            f"--tempdir={where}",
            f"--junit-xml={report / 'report.xml'}",
            *arguments,
        ],
        env=environment,
        cwd=report,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=900,
        check=False,
        user=user,
        group=None if user is None else pwd.getpwnam(user).pw_gid,
        extra_groups=None if user is None else [],
    )
    # The header; tests name their files relative to this directory.
    assert f"\n== cwd: {where}/test_python_" in result.stdout, result.stdout[:2000]
    assert (report / "report.xml").exists(), f"the suite did not end:\n{result.stdout[-5000:]}"
    # A test that fails in a subtest has no name in the XML; the output has all names.
    failures = frozenset(re.findall(r"^(?:FAIL|ERROR): \S+ \(([^)]+)\)", result.stdout, re.MULTILINE))
    passed = frozenset(
        name
        for case in ET.parse(report / "report.xml").iter("testcase")  # noqa: S314 - written by the suite just now
        if (name := case.get("name")) and not {"skipped", "failure", "error"} & {child.tag for child in case}
    )
    return Run(passed - failures, failures, result.stdout)


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    for name, package in PACKAGE_OF.items():
        if not list(STDLIB.glob(name)):
            pytest.fail(f"{STDLIB / name} is missing: apt-get install {package}", pytrace=False)


@pytest.fixture(scope="module")
def suite_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PYTHONPATH on which the package `test` is Debian's and has test_sqlite3 as well."""
    path = tmp_path_factory.mktemp("suite")
    shutil.copytree(STDLIB / "test", path / "test", symlinks=True)
    if not (path / "test/test_sqlite3").exists():
        extract_source("Lib/test/test_sqlite3", path / "test", tmp_path_factory.mktemp("debian-source"))
    return path


def extract_source(directory: str, into: Path, state: Path) -> None:
    """Copy *directory* out of Debian's source package of Python; apt's own state stays as it is, *state* is used."""
    (state / "lists/partial").mkdir(parents=True)
    (state / "parts").mkdir()
    for path in Path("/etc/apt/sources.list.d").glob("*.sources"):
        sources = re.sub(r"(?m)^Types:.*$", "Types: deb-src", path.read_text())
        (state / "parts" / path.name).write_text(sources)
    for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.list")):
        if path.exists():
            sources = re.sub(r"(?m)^deb\s", "deb-src ", path.read_text())
            (state / "parts" / f"{path.stem}.list").write_text(sources)
    apt_get = [
        "apt-get",
        "--option=Dir::Etc::SourceList=/dev/null",
        f"--option=Dir::Etc::SourceParts={state / 'parts'}",
        f"--option=Dir::State::Lists={state / 'lists'}",
    ]
    extract = f"tar -xf *.orig.tar.* -C '{into}' --wildcards --strip-components=3 '*/{directory}'"
    for command in (
        [*apt_get, "update"],
        [*apt_get, "source", "--download-only", "--tar-only", "python3.11"],
        ["sh", "-c", extract],
    ):
        done = subprocess.run(command, cwd=state, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.fail(f"no {directory} of Debian's python3.11: {command}: {done.stderr}", pytrace=False)


def compare(on_source: Run, on_mount: Run, modules: tuple[str, ...], *, at_least: int) -> None:
    """Fail with each test that passes on SOURCE and not on the mount, and with each exception that is none."""
    assert len(on_source.passed) >= at_least, f"only {len(on_source.passed)} tests ran and passed on SOURCE"
    assert {name.split(".")[1] for name in on_source.passed} == set(modules), "a whole module did not run"
    lost = on_source.passed - on_mount.passed
    new = sorted(lost - EXCEPTIONS.keys()) + sorted(on_mount.failures - on_source.failures - lost)
    assert not new, "\n\n".join([f"{len(new)} tests pass on SOURCE only", *map(on_mount.excerpt, new[:20]), *new[20:]])
    stale = EXCEPTIONS.keys() & on_source.passed & on_mount.passed
    assert not stale, f"no exceptions any more: {sorted(stale)}"


@pytest.mark.slow
def test_every_test_of_files_that_passes_on_source_passes_on_the_mount(
    disk_path: Path, tmp_path: Path, suite_path: Path
) -> None:
    source = disk_path / "src"  # no longer than "mnt": a socket's path has a limit, and tests that pass it skip
    source.mkdir()
    runs = {}
    with Mount(source, disk_path / "mnt", "monitor=none", log=tmp_path / "log") as mount:
        for name, where in (("src", source), ("mnt", mount.mountpoint)):
            runs[name] = run_suite(where / f"on-{name}", tmp_path / name, *IGNORED, *MODULES, path=suite_path)
        assert "Traceback" not in mount.log_text(), mount.log_text()
    compare(runs["src"], runs["mnt"], MODULES, at_least=2350)


@pytest.mark.slow
@pytest.mark.parametrize("who_checks", ["SOURCE", "kernel"])
def test_every_test_of_files_that_passes_for_a_user_on_source_passes_on_the_mount(
    disk_path: Path, tmp_path: Path, who_checks: str
) -> None:
    source = disk_path / "src"
    source.mkdir()
    reports = disk_path / "reports"
    reports.mkdir()
    options = ["allow_other", "default_permissions"] if who_checks == "kernel" else ["allow_other"]
    runs = {}
    with Mount(source, disk_path / "mnt", *options, "monitor=none", log=tmp_path / "log") as mount:
        for name, where in (("src", source), ("mnt", mount.mountpoint)):
            runs[name] = run_suite(
                where / f"on-{name}", reports / name, *IGNORED_OF_USERS, *MODULES_OF_USERS, user="nobody"
            )
        assert "Traceback" not in mount.log_text(), mount.log_text()
    compare(runs["src"], runs["mnt"], MODULES_OF_USERS, at_least=900)
