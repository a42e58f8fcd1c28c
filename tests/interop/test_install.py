"""contrib/install: into a DESTDIR, used from there, and away again."""

from __future__ import annotations

import os
import re
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

# As on a machine on which an older version serves a mount. What is written goes to layers of this namespace's own.
DETACHED = """
set -eu
mount --make-rprivate /
# A copy of somebody's mount would keep it in use after he has unmounted it.
grep ' - fuse.iohang' /proc/self/mountinfo | cut -d' ' -f5 | while read -r at; do umount -l "$at" || true; done
[ ! -d /run/systemd ] || mount -t tmpfs tmpfs /run/systemd
mount -t tmpfs tmpfs "$3"
mount -t tmpfs tmpfs /opt
cp -a "$2/opt/iohang-fuse" /opt/
for place in /usr/bin /usr/sbin /usr/local; do
    mkdir -p "$3$place/upper" "$3$place/work"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$3$place/upper,workdir=$3$place/work" $place
done
cd /opt/iohang-fuse
new=$(readlink venv) old=/opt/iohang-fuse/venv-old
cp -a "$new" $old
sed -i "s|$new|$old|g" $old/pyvenv.cfg $old/bin/iohang-mount
ln -sfn $old venv
mkdir "$3/src" "$3/mnt"
echo content >"$3/src/file"
venv/bin/iohang-mount "$3/src" "$3/mnt" -o monitor=none 2>/dev/null
exec 3<"$3/mnt/file"
umount -l "$3/mnt"
echo "== upgrade"
"$1"
ls -d venv-*
echo "== uninstall"
"$1" --uninstall 2>&1 || echo "code $?"
cat <&3
exec 3<&-
for _ in $(seq 600); do pgrep -f "^$old/" >/dev/null || break; sleep 0.1; done
echo "== upgrade without a user"
"$1"
ls -d venv-*
echo "== uninstall without a user"
"$1" --uninstall
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


def test_a_server_of_a_detached_mount_keeps_its_environment(root: Path, tmp_path: Path) -> None:
    """contrib/install: "servers that run go on with theirs", one whose mount was detached (`umount -l`), too."""
    done = subprocess.run(
        [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c", DETACHED, "sh", INSTALL, root, tmp_path),
        ],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _, upgrade, uninstall, upgrade_later, uninstall_later = re.split(r"^== .*\n", done.stdout, flags=re.MULTILINE)
    old, new = f"{PREFIX}/venv-old", os.readlink(root / PREFIX[1:] / "venv")
    pids = re.findall(
        rf"^install: {old} stays until the next time; still running from it: (.*) $", upgrade, re.MULTILINE
    )
    assert len(pids) == 1
    assert re.fullmatch(r"\d+ \(iohang-mount\)", pids[0])
    assert f"this version is in use from now on: {new}\n" in upgrade
    assert {*upgrade.splitlines()[-2:]} == {Path(old).name, Path(new).name}
    assert uninstall.splitlines() == [
        f"install: still running: {pids[0]} - end that first; a mount that was detached has a server until its last user is gone",
        "code 1",
        "content",
    ]
    assert f"install: removed {old}\n" in upgrade_later
    assert upgrade_later.splitlines()[-1] == Path(new).name
    assert f"install: removed {PREFIX}\n" in uninstall_later


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
