"""The guest's kernel and initramfs: fetched and packed once, then taken from a cache.

1. Debian's cloud kernel is only data here: fetched with apt-get, unpacked with dpkg-deb, never installed.
2. What is in the cache is whole: everything is made beside its place, under a lock, and renamed into it.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_METAPACKAGE = "linux-image-cloud-amd64"

_INIT = Path(__file__).with_name("init.sh")

_MODULE_TREE = "modules"
"""All of the kernel's modules, as /lib/modules has them: for a guest with a root file system of its own (debian/image.py)."""

_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)

_DOWNLOAD_TIMEOUT_S = 600
"""27 MB; a mirror that takes longer is not going to."""

_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "setpriv": "util-linux",
}

_FETCHERS = {"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg"}


class GuestUnavailableError(RuntimeError):
    """No guest can be run on this machine; the message is one line that says what is missing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What QEMU boots."""

    release: str
    vmlinuz: Path
    initramfs: Path
    modules: Path  # what belongs in /lib/modules


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/iohang-fuse/guest`, in `~/.cache` without the variable."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "iohang-fuse" / "guest"


def build(cache: Path | None = None, init: Path = _INIT, *, rebuild: bool = False) -> Kernel:
    """The kernel and an initramfs with the present init.sh (or *init*), made in *cache* where they are not there already.

    The kernel is fetched once and then kept; *rebuild* fetches the newest. Several processes may call this
    at once. Raises GuestUnavailableError where a program is missing or the kernel cannot be fetched.
    """
    cache = cache or default_cache()
    require(_PACKAGES)
    busybox = Path(shutil.which("busybox") or "busybox").resolve()
    if b"ld-linux" in _program_interpreter(busybox):
        raise GuestUnavailableError(f"a guest needs a static busybox, {busybox} is not: apt-get install busybox-static")
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = cache / "kernel"
        if rebuild or not (folder / _MODULE_TREE).exists():  # one without it is an earlier version's
            shutil.rmtree(folder, ignore_errors=True)
            _fetch_kernel(folder)
        release = (folder / "release").read_text().strip()
        initramfs = _initramfs(cache, folder, busybox, release, init)
    return Kernel(release, folder / "vmlinuz", initramfs, folder / _MODULE_TREE)


def require(programs: dict[str, str]) -> None:
    """Raises GuestUnavailableError that names the packages of those *programs* (program: package) that are not there."""
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing:
        raise GuestUnavailableError(f"a guest needs: apt-get install {' '.join(missing)}")


def _program_interpreter(program: Path) -> bytes:
    """The first page of an ELF file: a dynamic one names its loader there, behind its program headers."""
    with program.open("rb") as file:
        return file.read(4096)


def _fetch_kernel(folder: Path) -> None:
    """Download and unpack the kernel package: *folder* then has vmlinuz, release, modules/ and those for booting as NAME.ko."""
    require(_FETCHERS)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="kernel.") as work_name:
        work = Path(work_name)
        package = _kernel_package()
        run("apt-get", "download", package, cwd=work)
        archive = next(work.glob("*.deb"))
        run("dpkg-deb", "-x", str(archive), "unpacked", cwd=work)
        vmlinuz = next((work / "unpacked" / "boot").glob("vmlinuz-*"))
        release = vmlinuz.name.removeprefix("vmlinuz-")
        ready = work / "ready"
        ready.mkdir()
        vmlinuz.rename(ready / "vmlinuz")
        for module in _MODULES:
            found = sorted((work / "unpacked").glob(f"**/kernel/drivers/**/{module}.ko*"))
            if not found:
                raise GuestUnavailableError(f"{package} has no module {module}")
            data = found[0].read_bytes()
            # From Debian 13 on the modules are compressed, and busybox's insmod need not know how.
            (ready / f"{module}.ko").write_bytes(lzma.decompress(data) if found[0].suffix == ".xz" else data)
        (work / "unpacked" / "lib" / "modules").rename(ready / _MODULE_TREE)
        (ready / "release").write_text(release + "\n")
        ready.rename(folder)


def _kernel_package() -> str:
    """The package behind the metapackage; its name carries the version, so it must be asked for."""
    for line in run("apt-cache", "depends", "--important", _METAPACKAGE).splitlines():
        word, _, package = line.strip().partition("Depends: ")
        if not word and package.startswith("linux-image-"):
            return package
    raise GuestUnavailableError(f"apt knows no {_METAPACKAGE}: this needs Debian's package lists (apt-get update)")


def _initramfs(cache: Path, folder: Path, busybox: Path, release: str, init: Path) -> Path:
    """The initramfs with *init* and the present busybox, named after what is in it."""
    digest = hashlib.sha256(release.encode() + init.read_bytes() + busybox.read_bytes()).hexdigest()
    archive = cache / f"initramfs-{digest[:16]}.cpio"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory(dir=cache, prefix="initramfs.") as work_name:
        root = Path(work_name) / "root"
        for name in ("bin", "dev", "modules", "proc", "root", "run", "sys"):
            (root / name).mkdir(parents=True)
        shutil.copy(busybox, root / "bin" / "busybox")
        shutil.copy(init, root / "init")
        (root / "init").chmod(0o755)
        for module in _MODULES:
            shutil.copy(folder / f"{module}.ko", root / "modules")
        names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        packed = Path(work_name) / "cpio"
        # Uncompressed: unpacking would cost more under TCG than reading 3 MB.
        run("cpio", "--quiet", "-o", "-H", "newc", "-O", str(packed), cwd=root, stdin=names)
        packed.rename(archive)
    return archive


def run(*command: str, cwd: Path | None = None, stdin: str = "", timeout_s: float = _DOWNLOAD_TIMEOUT_S) -> str:
    """The command's output; its last line of complaint as GuestUnavailableError if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise GuestUnavailableError(f"{' '.join(command)}: not done in {timeout_s:g} s") from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise GuestUnavailableError(f"{' '.join(command)}: {why}")
    return done.stdout
