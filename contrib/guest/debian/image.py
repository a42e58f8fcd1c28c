"""Debian 12 with systemd as a disk image for guests: built by debootstrap once, then taken from a cache.

    python -m contrib.guest.debian.image             builds it where it is not there, and says where it is
    python -m contrib.guest.debian.image --rebuild   builds it anew, from what Debian has today, with a new kernel

1. The image has Debian's packages and all of the kernel's modules (fuse, nfs, nfsd, device-mapper, nftables, netem), and nothing of
   this tree: a change of code costs no new image. `build(extra=...)` makes one with more packages beside it.
2. This tree comes in at each run, as a tar archive that the initramfs (init.sh) unpacks over the root file system.
3. What is in the cache is whole, as in kernel.py: made beside its place, under a lock, and renamed into it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from contrib.guest import kernel
from contrib.guest.kernel import GuestUnavailableError, Kernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SUITE = "bookworm"

PACKAGES = (
    "systemd-sysv",  # systemd as init
    "udev",  # loads modules, and makes /dev/mapper and /dev/virtio-ports
    "dbus",  # systemctl's way to ask for a power-off
    "kmod",  # modprobe
    "fuse3",  # libfuse 3, on which pyfuse3 is built
    "python3",  # what iohang-fuse runs in
    "dmsetup",  # a disk that fails on command
    "e2fsprogs",  # which of its blocks an image has
)

_RECIPE = "1"
"""A new number for whatever changes the image, and stands neither in PACKAGES nor in the kernel's release."""

_IMAGE_BYTES = 4 << 30
"""Sparse; what is written in a guest goes to an overlay of its own."""

_BUILD_TIMEOUT_S = 1800
"""Under a minute on an idle machine with a mirror nearby."""

TREE = Path(__file__).parents[3]
"""Of the project."""
_INIT = Path(__file__).with_name("init.sh")
_AGENT = Path(__file__).with_name("agent.py")
_AGENT_UNIT = Path(__file__).with_name("agent.service")

_PROGRAMS = {"debootstrap": "debootstrap", "mke2fs": "e2fsprogs", "depmod": "kmod", "qemu-img": "qemu-utils"}

_SITE = "usr/local/lib/python3.11/dist-packages"
"""Debian's Python 3.11 looks here."""


@dataclass(frozen=True, slots=True)
class Debian:
    """What a guest boots: the kernel, and a root file system that nobody may write to."""

    kernel: Kernel
    root: Path


def build(cache: Path | None = None, extra: Iterable[str] = (), *, rebuild: bool = False) -> Debian:
    """The image with PACKAGES and *extra* ones, made in *cache* where it is not there already.

    Several processes may call this at once. Raises GuestUnavailableError where it cannot be made.
    """
    kernel.require(_PROGRAMS)
    if sys.version_info[:2] != (3, 11):
        raise GuestUnavailableError("a Debian 12 guest gets this environment's packages: run this with Python 3.11")
    cache = cache or kernel.default_cache()
    booted = kernel.build(cache, _INIT, rebuild=rebuild)
    packages = sorted({*PACKAGES, *extra})
    digest = hashlib.sha256(" ".join([_RECIPE, SUITE, booted.release, *packages]).encode()).hexdigest()
    image = cache / f"debian-{digest[:16]}.ext4"
    with (cache / "lock-debian").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if rebuild:
            for old in cache.glob("debian-*.ext4"):  # of other kernels, too; who has one open keeps it
                old.unlink()
        if not image.exists():
            _make_image(image, packages, booted)
    return Debian(booted, image)


def _make_image(image: Path, packages: list[str], booted: Kernel) -> None:
    if os.geteuid() != 0:
        raise GuestUnavailableError("debootstrap needs root; no Debian guest can be built")
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="debian.") as work_name:
        work = Path(work_name)
        root = work / "root"
        kernel.run(
            "debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(root), _mirror(),
            timeout_s=_BUILD_TIMEOUT_S,
        )  # fmt: skip
        _lighten(root)
        shutil.copytree(booted.modules, root / "lib" / "modules", symlinks=True, dirs_exist_ok=True)
        kernel.run("depmod", "-b", str(root), booted.release)
        (root / "etc" / "hostname").write_text("iohang-guest\n")
        (root / "etc" / "hosts").write_text("127.0.0.1 localhost iohang-guest\n")
        made = work / "image"
        with made.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        kernel.run("mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(root), str(made))
        made.rename(image)


def _mirror() -> str:
    """Where this machine's own apt gets the suite from; Debian's own address where it does not have it."""
    listed = kernel.run("apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)")
    for line in listed.splitlines():
        origin, codename, component, address = (line.split(" ", 3) + [""] * 4)[:4]
        if (origin, codename, component) == ("Debian", SUITE, "main") and address.startswith("http"):
            return address
    return "http://deb.debian.org/debian"


def _lighten(root: Path) -> None:
    """What no guest reads."""
    for name in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)


# ---- what comes in at each run


def payload(archive: Path, files: Mapping[str, str | Path] | None = None) -> None:
    """Write *archive*: iohang-fuse as this tree has it and this environment's packages for it, the agent, and *files*.

    *files* are texts by their paths in the guest; one that begins with `#!` is made executable, and one that is `-> TARGET` is a
    symbolic link. A Path is a file of the host's, which is copied.
    """
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for source, name in _program_files():
            tar.add(source, name, recursive=False, filter=_owned_by_root)
        for path, content in {**_own_files(), **(files or {})}.items():
            if isinstance(content, Path):
                tar.add(content, path.lstrip("/"), filter=_owned_by_root)
            else:
                _add_text(tar, path.lstrip("/"), content)


def _program_files() -> Iterator[tuple[Path, str]]:
    for package in ("iohang_fuse", "contrib"):
        for path in sorted((TREE / package).rglob("*")):
            if path.is_file():
                yield path, f"{_SITE}/{path.relative_to(TREE)}"
    for distribution in _needed("iohang-fuse"):
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if ".." not in file.parts and path.is_file():  # no scripts
                yield path, f"{_SITE}/{file}"


def _needed(name: str) -> list[importlib.metadata.Distribution]:
    """The distributions that *name* needs, as they are installed here; itself it is editable, and taken from the tree."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [name]
    while wanted:
        for requirement in importlib.metadata.requires(wanted.pop()) or ():
            needed = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
            if "extra ==" in requirement or needed in found:
                continue
            try:
                found[needed] = importlib.metadata.distribution(needed)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another system or Python, or this environment would not work either
            wanted.append(needed)
    return list(found.values())


def _own_files() -> dict[str, str]:
    files = {
        "usr/local/lib/iohang-guest/agent.py": _AGENT.read_text(),
        "etc/systemd/system/iohang-agent.service": _AGENT_UNIT.read_text(),
        "etc/systemd/system/multi-user.target.wants/iohang-agent.service": "-> ../iohang-agent.service",
    }
    for name, entry in tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["scripts"].items():
        module, function = entry.split(":")
        folder = "usr/sbin" if "." in name else "usr/bin"  # mount(8) and umount(8) look for their helpers in /sbin
        files[f"{folder}/{name}"] = (
            f"#!/usr/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
    return files


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def _add_text(tar: tarfile.TarFile, path: str, text: str) -> None:
    member = tarfile.TarInfo(path)
    if text.startswith("-> "):
        member.type, member.linkname = tarfile.SYMTYPE, text.removeprefix("-> ")
        tar.addfile(member)
        return
    data = text.encode()
    member.size = len(data)
    member.mode = 0o755 if text.startswith("#!") else 0o644
    tar.addfile(member, io.BytesIO(data))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rebuild", action="store_true", help="build it anew, even if it is there")
    try:
        print(build(rebuild=parser.parse_args().rebuild).root)
    except GuestUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
