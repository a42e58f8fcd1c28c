"""contrib/install: into a DESTDIR, used from there, and away again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "contrib" / "install"
PREFIX = "/opt/iohang-fuse"
UNIT = "usr/local/lib/systemd/system/iohang@.service"
LINKS = {
    "usr/bin/iohang-mount",
    "usr/bin/iohangctl",
    "usr/bin/iohang-flaky",
    "usr/sbin/mount.iohang",
    "usr/sbin/umount.fuse.iohang-mount",
}

# As on a machine on which it is installed: what lies beneath DESTDIR stands where it is meant to be.
USE = """
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs /opt
mkdir /opt/iohang-fuse
mount --bind "$1/opt/iohang-fuse" /opt/iohang-fuse
for place in /usr/bin /usr/sbin; do mount -t overlay overlay -o "lowerdir=$1$place:$place" $place; done
cd /
iohang-mount --version
iohangctl --help >/dev/null
iohang-flaky --help >/dev/null
mount -t iohang "$2" "$3" -o _netdev,monitor=none
cat "$3/file"
umount "$3"
mount -t fuse.iohang-mount "$2" "$3" -o monitor=none
cat "$3/file"
umount -l "$3"
"""


def test_shellcheck() -> None:
    """A shell script that others run as root: shellcheck has nothing to say of it."""
    done = subprocess.run(["shellcheck", INSTALL], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def install(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INSTALL, *arguments],
        env=os.environ | {"DESTDIR": str(root)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("destdir")
    (root / "usr/sbin").mkdir(parents=True)
    (root / "sbin").symlink_to("usr/sbin")  # Debian 12
    done = install(root)
    assert done.returncode == 0, done.stderr
    return root


def outside(root: Path) -> set[str]:
    """Files and links that are not in PREFIX."""
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()}
    return {path for path in found if not path.startswith(PREFIX[1:])} - {"sbin"}


def test_what_is_where(root: Path) -> None:
    """Issue 5: "an `install` step for symlinks to /usr/sbin and /sbin"; nothing in DESTDIR knows of DESTDIR."""
    found = outside(root)
    assert {path for path in found if "/man/" not in path} == LINKS | {UNIT}
    pages = {path for path in found if path.startswith("usr/local/share/man/man8/")}
    assert {Path(path).name for path in pages} == {f"{Path(program).name}.8" for program in LINKS}
    for path in LINKS:
        assert os.readlink(root / path) == f"{PREFIX}/venv/bin/{Path(path).name}"
    venv = root / os.readlink(root / PREFIX[1:] / "venv")[1:]
    for path in [*(venv / "bin").iterdir(), venv / "pyvenv.cfg"]:
        assert str(root).encode() not in path.read_bytes(), path
    assert (root / PREFIX[1:] / "examples/fstab").exists()


def test_a_second_run_does_nothing(root: Path) -> None:
    """Idempotent, and it says what it did."""
    before = {path: path.lstat().st_mtime_ns for path in root.rglob("*") if path.is_symlink()}
    done = install(root)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert {path: path.lstat().st_mtime_ns for path in root.rglob("*") if path.is_symlink()} == before


def test_it_works_from_there(root: Path, tmp_path: Path) -> None:
    """By all its names, through mount(8), with nothing of this tree or its virtual environment in the way."""
    (tmp_path / "src").mkdir()
    (tmp_path / "mnt").mkdir()
    (tmp_path / "src/file").write_text("content\n")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", USE, "sh", root, tmp_path / "src", tmp_path / "mnt"],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, *content = done.stdout.splitlines()
    assert version.startswith("iohang-mount 0.")
    assert content == ["content", "content"]


def test_what_an_administrator_has_changed_stays(root: Path) -> None:
    """Bad input gets one clear line: a file of somebody else is neither replaced nor removed."""
    unit = root / UNIT
    text = unit.read_text()
    unit.write_text(text + "# mine\n")
    try:
        done = install(root)
        assert done.returncode == 1
        assert (
            done.stderr
            == f"install: {unit} is not ours, or has been changed: move it away first (changes belong in a drop-in)\n"
        )
        assert unit.read_text().endswith("# mine\n")
    finally:
        unit.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--help-me"], {}, "'--help-me' is no argument; say nothing, or --uninstall"),
        (["--uninstall", "now"], {}, "one argument at most: --uninstall"),
        ([], {"PREFIX": "opt"}, "PREFIX is 'opt'; say the absolute path of a directory of its own"),
        ([], {"PREFIX": "/opt"}, "PREFIX is '/opt'; say the absolute path of a directory of its own"),
        ([], {"DESTDIR": "here"}, "DESTDIR is 'here'; say an absolute path"),
        (["--uninstall"], {"PREFIX": "/opt/other"}, "nothing is installed in /opt/other"),
        ([], {"PREFIX": "/opt/taken"}, "/opt/taken is there and not ours; say PREFIX=DIR for another place"),
    ],
)
def test_refusals(tmp_path: Path, arguments: list[str], environment: dict[str, str], words: str) -> None:
    """Bad input gets one clear line, and nothing is done."""
    (tmp_path / "opt/taken").mkdir(parents=True)
    (tmp_path / "opt/taken/file").touch()
    done = install(tmp_path, *arguments, **environment)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [*tmp_path.rglob("*")] == [tmp_path / "opt", tmp_path / "opt/taken", tmp_path / "opt/taken/file"]


def test_uninstall(root: Path) -> None:
    """All of it away again, and nothing else. The last test: the others need what it removes."""
    (root / "usr/bin/of-somebody-else").touch()
    done = install(root, "--uninstall")
    assert done.returncode == 0, done.stderr
    assert outside(root) == {"usr/bin/of-somebody-else"}
    assert not (root / PREFIX[1:]).exists()
    assert done.stdout.count("install: removed /usr") >= len(LINKS) + 1
