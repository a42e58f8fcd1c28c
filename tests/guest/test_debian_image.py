"""What a Debian guest gets from this tree at each run, and what is said where no guest can be built."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

import pytest

from contrib.guest import kernel
from contrib.guest.debian import image
from contrib.guest.kernel import GuestUnavailableError

if TYPE_CHECKING:
    from pathlib import Path


def test_the_payload_is_this_tree_and_what_it_needs(tmp_path: Path) -> None:
    """Nothing is installed in the guest: the programs run from the archive, and tests and linters stay at home."""
    (tmp_path / "vmlinuz").write_bytes(b"\0\xff")
    files = {"/etc/fstab": "none\n", "/usr/local/bin/outage": "#!/bin/sh\n", "/boot/vmlinuz": tmp_path / "vmlinuz"}
    image.payload(tmp_path / "payload.tar", files)
    with tarfile.open(tmp_path / "payload.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
        fstab = archive.extractfile("etc/fstab")
        assert fstab is not None
        assert fstab.read() == b"none\n"
        vmlinuz = archive.extractfile("boot/vmlinuz")
        assert vmlinuz is not None
        assert vmlinuz.read() == b"\0\xff"
    site = "usr/local/lib/python3.11/dist-packages"
    for name in (
        "iohang_fuse/mount.py",
        "contrib/guest/debian/consumer.py",
        "trio/__init__.py",
        "pydantic_core/__init__.py",
    ):
        assert f"{site}/{name}" in members
    assert not [name for name in members if name.startswith((f"{site}/pytest/", f"{site}/mypy/"))]
    for name in ("usr/bin/iohang-mount", "usr/bin/iohangctl", "usr/sbin/mount.iohang", "usr/local/bin/outage"):
        assert members[name].mode == 0o755
    assert members["etc/systemd/system/multi-user.target.wants/iohang-agent.service"].issym()
    assert {member.uid for member in members.values()} == {0}


@pytest.mark.parametrize(
    ("listed", "mirror"),
    [
        ("Debian bookworm-updates main http://a/\nDebian bookworm main http://b/debian/\n", "http://b/debian/"),
        (
            "Other bookworm main http://a/\nDebian bookworm main mirror+file:/etc/apt/list\n",
            "http://deb.debian.org/debian",
        ),
        ("", "http://deb.debian.org/debian"),
    ],
)
def test_debian_comes_from_where_apt_has_it(monkeypatch: pytest.MonkeyPatch, listed: str, mirror: str) -> None:
    """A site's own mirror is used, and no other origin's; where there is none, Debian's."""
    monkeypatch.setattr(kernel, "run", lambda *_command: listed)
    assert image._mirror() == mirror


def test_a_missing_program_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line that can be pasted."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestUnavailableError, match=r"^a guest needs: apt-get install debootstrap e2fsprogs"):
        image.build(tmp_path / "cache")
