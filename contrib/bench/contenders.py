"""What is compared, on what: SOURCEs, and the servers mounted above them, each as processes whose CPU time is known.

Who is mounted here is unmounted here, whatever happens: everything is a context manager.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from contrib.bench.plan import DELAY_US, DIRECT_SOURCE, OUR_OPTIONS, PEER, SOURCE, SOURCES
from tests.harness import Mount, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")

FILE_NAME = "bench.img"
FILE_BYTES = 256 << 20
"""Beyond any CPU's cache, and small enough to be in the page cache as a whole and to fit any tmpfs."""

PROGRAMS = {
    "fio": "fio", "bindfs": "bindfs", "nbdkit": "nbdkit", "nbdfuse": "libnbd-bin", "gcc": "gcc", "pkg-config": "pkg-config",
    "findmnt": "util-linux", "umount": "mount",
}  # fmt: skip


class UnavailableError(Exception):
    """Something cannot run on the machine at hand; the message is one line."""


def require() -> None:
    """Raises UnavailableError with all that is missing."""
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        raise UnavailableError("this needs root and /dev/fuse")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        raise UnavailableError(f"this needs: apt-get install {' '.join(missing)}")


def file_system(path: Path) -> str:
    """The type of the file system at *path*: ext4, tmpfs, ..."""
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def cpu_s(pid: int | None) -> float:
    """User and system time of *pid* and its descendants, in seconds, as far as they live; 0 for None.

    The kernel's workers of io_uring are threads of the process, and so counted.
    """
    if pid is None:
        return 0
    ticks: dict[int, int] = {}
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name, in brackets, may have spaces and brackets in it.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])

    def descends(process: int) -> bool:
        while process not in (0, pid):
            process = parents.get(process, 0)
        return process == pid

    return sum(ticks[process] for process in ticks if descends(process)) / os.sysconf("SC_CLK_TCK")


class ForeignServer:
    """A FUSE server that is not ours, in the foreground; it serves when *file* below its mount point has a size."""

    def __init__(self, command: list[str], file: Path, mountpoint: Path, log: Path, **environment: str) -> None:
        self.file, self.mountpoint, self._log = file, mountpoint, log
        self._name = command[0]
        mountpoint.mkdir(parents=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | environment,
                cwd=HERE.parent.parent,
                start_new_session=True,  # ^C is ours to act on, in the right order
            )
        try:
            wait_until(self._serves, what=f"{shlex.join(command)} to serve: {self._log_end()}")
        except BaseException:
            self.stop()
            raise

    def _serves(self) -> bool:
        if self.process.poll() is not None:
            raise UnavailableError(f"{self._name} ended: {self._log_end()}")
        try:
            return self.file.stat().st_size > 0
        except OSError:
            return False

    def _log_end(self) -> str:
        return " ".join(self._log.read_text(errors="replace").splitlines()[-2:])

    def stop(self) -> None:
        """Unmount and wait; by force what is busy or does not end."""
        if mounted_at(self.mountpoint):
            quiet = subprocess.run(["umount", str(self.mountpoint)], check=False, capture_output=True)
            if quiet.returncode:
                subprocess.run(["umount", "--lazy", str(self.mountpoint)], check=False)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Running:
    """A contender, ready: the *file* as its consumers see it, and the process that serves it."""

    name: str
    file: Path
    pid: int | None = None
    direct: bool = True
    """False: O_DIRECT would leave out the page cache that all others are served from."""
    unavailable: str = ""
    """Why it is not there, on this machine."""


@dataclass
class Site:
    """A SOURCE: the *directory* with the file in it, and the *real* file, where its bytes are in the end."""

    name: str
    title: str
    directory: Path
    real: Path
    scratch: Path
    """For mount points, logs, and what is compiled."""
    cached: bool = False
    """Whether SOURCE has a page cache that O_DIRECT goes past."""

    def warm(self) -> None:
        """The whole file clean, and in the page cache: neither a disk nor yesterday's writes are measured."""
        fd = os.open(self.real, os.O_RDWR)
        try:
            os.fsync(fd)
            block = bytearray(1 << 20)
            while os.readv(fd, [block]):
                pass
        finally:
            os.close(fd)


def compiled(source: Path, scratch: Path) -> Path:
    """The program that *source* in C makes with libfuse 3, in *scratch*."""
    if not EXAMPLES.exists():  # containers leave /usr/share/doc out, even where the package is installed
        raise UnavailableError(f"{EXAMPLES} is not there: it comes with Debian's libfuse3-dev, as documentation")
    program = scratch / "bin" / source.stem
    program.parent.mkdir(exist_ok=True)
    if not program.exists():
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"], check=True, capture_output=True, text=True
        )
        made = subprocess.run(
            ["gcc", "-O2", f"-I{EXAMPLES}", "-o", str(program), str(source), *flags.stdout.split()],
            check=False,
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise UnavailableError(f"gcc {source.name}: {(made.stderr.strip().splitlines() or ['failed'])[0]}")
    return program


def _mount_source(name: str, directory: Path, scratch: Path) -> ForeignServer | None:
    """The FUSE source *name* above *directory*, or nothing where the directory is the source."""
    mountpoint, log = scratch / "source", scratch / "source.log"
    file = mountpoint / FILE_NAME
    if name == "fuse":
        return ForeignServer(["bindfs", "-f", str(directory), str(mountpoint)], file, mountpoint, log)
    if name == "fuse-0.5ms":
        program = compiled(HERE / "delayed_source.c", scratch)
        command = [str(program), "-f", "-o", f"source={directory}", str(mountpoint)]
        return ForeignServer(command, file, mountpoint, log, DELAY_US=str(DELAY_US))
    if name == "flaky-0.5ms":
        rule = scratch / "rule"
        rule.write_text(f"read,write * delay={DELAY_US / 1e6}\n")
        command = [sys.executable, "-m", "iohang_fuse.flaky", str(directory), str(mountpoint), str(rule)]
        return ForeignServer(command, file, mountpoint, log)
    return None


@contextmanager
def source(name: str) -> Iterator[Site]:
    """SOURCE *name* with the file in it, gone afterwards. Raises UnavailableError where it cannot be."""
    disk = Path(os.environ.get("TMPDIR", "/var/tmp"))  # noqa: S108 - the disk's place for what is large
    place = Path("/dev/shm") if name == "tmpfs" or name.endswith("-0.5ms") else disk  # noqa: S108 - the one tmpfs that all have
    kind = file_system(place)
    if place != disk and kind != "tmpfs":
        raise UnavailableError(f"{place} is {kind}, not tmpfs")
    title = SOURCES[name].replace("ext4", kind)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="iohang-bench-", dir=place)))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="iohang-bench-")))
        real = directory / FILE_NAME
        block = os.urandom(1 << 20)
        with real.open("wb") as file:
            for _ in range(FILE_BYTES >> 20):
                file.write(block)
        server = _mount_source(name, directory, scratch)
        if server is not None:
            directory = stack.enter_context(server).mountpoint
        yield Site(name, title, directory, real, scratch, cached=name == "ext4" and kind != "tmpfs")


def _foreign_command(name: str, site: Site, mountpoint: Path) -> list[str]:
    file = site.directory / FILE_NAME
    match name:
        case "passthrough_ll":
            program = compiled(EXAMPLES / "passthrough_ll.c", site.scratch)
            return [str(program), "-f", "-o", f"source={site.directory}", str(mountpoint)]
        case "bindfs":
            return ["bindfs", "-f", str(site.directory), str(mountpoint)]
        case "nbdfuse":
            nbdkit = ["nbdkit", "-s", "--filter=retry-request", "file", str(file)]
            return ["nbdfuse", str(mountpoint), "--command", *nbdkit]
        case _:
            module = [sys.executable, "-m", "contrib.bench.empty_handlers"]
            return [*module, str(mountpoint), FILE_NAME, str(FILE_BYTES)]


def _start(name: str, site: Site, stack: ExitStack) -> Running:
    mountpoint = site.scratch / name / "mnt"
    log = site.scratch / f"{name}.log"
    if name in (SOURCE, DIRECT_SOURCE):
        return Running(name, site.directory / FILE_NAME, direct=name == DIRECT_SOURCE or not site.cached)
    if name in OUR_OPTIONS:
        mount = stack.enter_context(Mount(site.directory, mountpoint, "monitor=none", OUR_OPTIONS[name], log=log))
        return Running(name, mountpoint / FILE_NAME, mount.pid)
    file = mountpoint / ("nbd" if name == PEER else FILE_NAME)
    server = stack.enter_context(ForeignServer(_foreign_command(name, site, mountpoint), file, mountpoint, log))
    return Running(name, file, server.process.pid)


@contextmanager
def contenders(site: Site, names: list[str]) -> Iterator[list[Running]]:
    """All of *names* at once above the same file: those that nobody asks anything cost nothing."""
    with ExitStack() as stack:
        running = []
        for name in names:
            if name == DIRECT_SOURCE and not site.cached:
                continue
            try:
                running.append(_start(name, site, stack))
            except (UnavailableError, AssertionError) as error:
                lines = str(error).strip().splitlines() or ["it did not start"]
                running.append(Running(name, site.directory, unavailable=lines[-1]))
        yield running
