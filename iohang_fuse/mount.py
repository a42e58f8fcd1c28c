"""A mount from its checks to its end: background, limits, signals, unmount.

One order: everything that can be refused is checked before anything is done; then into the background; then the mount;
then the parent is told. Unmounting is the reverse, and says who is in the way.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import signal
import sys
from pathlib import Path

import pyfuse3
import trio

from iohang_fuse import __version__, background, diagnosis, limits, logs, receiver, source, syscalls
from iohang_fuse.commands import About, Commands
from iohang_fuse.config import MONITOR, Config
from iohang_fuse.engine import Engine, Unavailable
from iohang_fuse.events import Event, Op
from iohang_fuse.filesystem import Filesystem
from iohang_fuse.messages import error_words, sentence
from iohang_fuse.monitor import Monitor
from iohang_fuse.mountwords import libfuse_escaped
from iohang_fuse.notify import Notify
from iohang_fuse.rehandle import Policy
from iohang_fuse.requests import Requests
from iohang_fuse.service import Service

log = logging.getLogger(__name__)

SUBTYPE = "iohang-mount"  # findmnt shows fuse.iohang-mount: the type that fstab has, too
EX_USAGE, EX_SYSTEM, EX_FAILURE = 1, 2, 32  # mount(8), EXIT STATUS

_WHEN_FREE_S = 600.0
"""After a first SIGTERM that found the mount in use: how long it is unmounted as soon as it is free. Long enough for guests to
shut down; not for ever, or a SIGTERM that everybody has forgotten would take the mount away between two runs of a guest."""

_LAST_CLOSE_S = 10.0
"""After a second SIGTERM: how long consumers get to close their files before they lose the mount."""


class Refusal(Exception):
    """Why there will be no mount, in one line, and mount(8)'s exit code for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def run(config: Config, *, foreground: bool, fake: bool = False, verbose: bool = False) -> int:
    """Mount and serve. Returns the exit code: of the server in the foreground, of the start in the background."""
    # In the background nobody is told: a NOTIFY_SOCKET there is that of somebody else, who called mount(8).
    notify = Notify.from_environment() if foreground else Notify()
    try:
        mountpoint = check_paths(config)
        check_log(config)
        limits.raise_open_files()
        check_limits(config)
    except Refusal as refusal:
        print(f"iohang-mount: {refusal}", file=sys.stderr)  # noqa: T201
        notify.tell(STATUS=refusal)
        return refusal.code
    if fake:
        return 0
    if foreground:
        with logs.to_stderr_or(config.log, verbose=verbose):
            return _serve(config, mountpoint, started=background.NoParent(), notify=notify)
    return background.run(
        lambda started: _in_background(config, mountpoint, verbose=verbose, started=started),
        complain=lambda text: print(f"iohang-mount: {text}", file=sys.stderr),  # noqa: T201
    )


def _in_background(config: Config, mountpoint: str, *, verbose: bool, started: background.Started) -> int:
    with logs.to_syslog_or(config.log, verbose=verbose):
        return _serve(config, mountpoint, started=started, notify=Notify())


# ---- checks


def check_paths(config: Config) -> str:
    """The mount point without symlinks. Raises `Refusal` if SOURCE or MOUNTPOINT cannot be what they are given as.

    MOUNTPOINT is neither opened nor listed: on an automount that would wait for the mount that we are.
    """
    try:
        if not Path(config.source).is_dir():
            what = "is not a directory" if Path(config.source).exists() else "does not exist"
            raise Refusal(EX_FAILURE, f"SOURCE {config.source} {what}")
    except OSError as error:
        raise Refusal(EX_FAILURE, f"SOURCE {config.source}: {error_words(error.errno)}") from None
    origin = os.path.realpath(config.source)
    mountpoint = os.path.realpath(config.mountpoint)
    for mounted in diagnosis.mount_table():
        if mounted.mountpoint == mountpoint and mounted.fstype == f"fuse.{SUBTYPE}":
            state = "" if _answers(mountpoint) else ", and its server is gone; `umount` it first"
            raise Refusal(EX_FAILURE, f"{mountpoint} is already an iohang-mount of {mounted.source}{state}")
    try:
        is_directory = os.path.isdir(mountpoint)
    except OSError as error:
        raise Refusal(EX_FAILURE, f"MOUNTPOINT {mountpoint}: {error_words(error.errno)}") from None
    if not is_directory:
        what = "is not a directory" if os.path.lexists(mountpoint) else "does not exist"
        raise Refusal(EX_FAILURE, f"MOUNTPOINT {mountpoint} {what}")
    if _lies_in(origin, mountpoint):
        raise Refusal(EX_FAILURE, f"SOURCE {origin} lies under MOUNTPOINT {mountpoint}: the mount would hide it")
    if _lies_in(mountpoint, origin):
        raise Refusal(EX_FAILURE, f"MOUNTPOINT {mountpoint} lies under SOURCE {origin}: the mount would show itself")
    return mountpoint


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _answers(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)  # stat(2) could be answered from the kernel's cache
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def check_log(config: Config) -> None:
    """Raises `Refusal` if the log file cannot be written, while there is somebody to tell."""
    if config.log is not None:
        try:
            with config.log.open("ab"):
                pass
        except OSError as error:
            raise Refusal(EX_USAGE, f"log {config.log} cannot be written: {error_words(error.errno)}") from None


def _longest_timeout_s(config: Config) -> float:
    return max(config.read_timeout_s, config.write_timeout_s, config.fsync_timeout_s)


def check_limits(config: Config) -> None:
    """Raises `Refusal` with every limit that would kill the mount; the others are warned about when it serves."""
    fatal = [problem.text for problem in _limit_problems(config) if problem.fatal]
    if fatal:
        raise Refusal(EX_SYSTEM, "; ".join(fatal))


def _limit_problems(config: Config) -> list[limits.Problem]:
    timeouts = [t for t in (config.read_timeout_s, config.write_timeout_s, config.fsync_timeout_s) if t]
    return limits.problems(
        limits.read_system(),
        timeout_s=_longest_timeout_s(config),
        shortest_timeout_s=min(timeouts, default=0),
        interval_s=config.interval_s,
        max_background=config.max_background,
    )


# ---- serving


def _serve(config: Config, mountpoint: str, *, started: background.Started, notify: Notify) -> int:
    try:
        return trio.run(_Server(config, mountpoint, started, notify).run)
    except Refusal as refusal:
        log.error("%s", refusal)  # noqa: TRY400 - the line says it all
        started.refused(refusal.code, str(refusal))
        notify.tell(STATUS=refusal)
        return refusal.code


class _Server:
    """One serving process."""

    def __init__(self, config: Config, mountpoint: str, started: background.Started, notify: Notify) -> None:
        self._config = config
        self._mountpoint = mountpoint
        self._started = started
        try:
            engine = Engine(config.engine)
        except Unavailable as error:
            raise Refusal(EX_SYSTEM, f"engine uring is not to be had: {error}; or say engine=auto") from None
        self._requests = Requests(
            _policy(config),
            config.held_limit_bytes,
            [self._log_event],
            write_log=config.write_log_bytes,
            price=limits.price_of_held_bytes(),
            engine=engine,
        )
        if engine.ring is not None:
            self._requests.others_wait = receiver.others_wait
        self._monitor = self._make_monitor()
        self._service = Service(notify, self._requests, f"serving {config.source} at {mountpoint}")
        self._requests.listen(self._service.tell)
        self._unmounted = False
        self._free_by_s = 0.0
        self._device_minor = 0
        self._detached = False
        self._refusal: Refusal | None = None

    def _make_monitor(self) -> Monitor | None:
        path = self._config.monitor_path
        if path is None:
            return None
        about = About(str(self._config.source), self._mountpoint, __version__, os.getpid())
        commands = Commands(self._requests, about, functools.partial(os.kill, os.getpid(), signal.SIGTERM))
        major, minor, micro = (int(part) for part in __version__.split("."))
        monitor = Monitor(path, commands, (major, minor, micro))
        try:
            monitor.bind(self._config.monitor_group)
        except OSError as error:
            words = f"monitor: no socket at {path}: {error_words(error.errno)}"
            if self._config.monitor != MONITOR:
                raise Refusal(EX_SYSTEM, f"{words}; say monitor=PATH, or monitor=none") from None
            log.warning("%s. The mount is served without a monitor; say monitor=PATH, or monitor=none", words)
            return None
        self._requests.listen(monitor.tell)
        return monitor

    async def run(self) -> int:
        """Mount, serve until unmounted. Raises `Refusal` if the mount fails."""
        try:
            return await self._run()
        finally:
            if self._monitor is not None:
                self._monitor.close()

    async def _run(self) -> int:
        config = self._config
        os.umask(0)  # the kernel has applied the caller's
        try:
            root = source.open_root(str(config.source))
        except OSError as error:
            raise Refusal(EX_FAILURE, f"SOURCE {config.source}: {error_words(error.errno)}") from None
        checks_names = "allow_other" not in config.mount_words or "default_permissions" in config.mount_words
        filesystem = Filesystem(
            root,
            self._requests,
            attr_timeout_s=config.attr_timeout_s,
            # Other users, and nobody but SOURCE to check their right to search a directory: ask it each time.
            entry_timeout_s=config.attr_timeout_s if checks_names else 0,
            direct=config.direct == "auto",
            source_path=str(config.source),
        )
        options = {*config.mount_words, f"fsname={libfuse_escaped(str(config.source))}", f"subtype={SUBTYPE}"}
        try:
            pyfuse3.init(filesystem, self._mountpoint, options)
        except RuntimeError as error:
            raise Refusal(
                EX_FAILURE, f"the kernel or libfuse refused the mount on {self._mountpoint}: {error}"
            ) from None
        limits.alarm_clock()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(filesystem.close_unwanted)
                nursery.start_soon(self._requests.serve, nursery)
                nursery.start_soon(self._mind_signals, nursery)
                nursery.start_soon(self._announce)
                nursery.start_soon(self._service.serve)
                if self._monitor is not None:
                    nursery.start_soon(self._monitor.serve)
                await receiver.main()
                await self._say_goodbye("unmounted")
                nursery.cancel_scope.cancel()
        finally:
            # Never unmount here. After umount(8) there is nothing to do; after a crash the mount must stay in the way
            # (ENOTCONN), or QEMU would write into the bare directory beneath.
            pyfuse3.close(unmount=False)
        if self._refusal is not None:
            raise self._refusal
        log.info("%s is unmounted", self._mountpoint)
        return 0

    async def _announce(self) -> None:
        """Once the mount answers, with all limits in force: say so."""
        try:
            status = await trio.to_thread.run_sync(os.stat, self._mountpoint)
            self._device_minor = os.minor(status.st_dev)
        except OSError as error:
            self._refusal = Refusal(EX_FAILURE, f"SOURCE {self._config.source}: {error_words(error.errno)}")
            await trio.to_thread.run_sync(syscalls.umount, self._mountpoint, syscalls.MNT_DETACH)
            return
        try:
            await trio.to_thread.run_sync(limits.set_max_background_of, self._mountpoint, self._config.max_background)
        except OSError as error:
            log.warning(
                "max_background stays at the kernel's default (12): %s. While more requests than that are held, every image "
                "of this mount waits. Mount fusectl on /sys/fs/fuse/connections, and mount again.",
                error,
            )
        for problem in _limit_problems(self._config):
            log.warning("%s", problem.text)
        engine = self._requests.engine
        log.info("data I/O: engine %s%s", engine.name, f" ({engine.why_not})" if engine.why_not else "")
        timeout_s = _longest_timeout_s(self._config)
        log.info(
            "%s is served at %s by process %d: a failed request is tried every %g s and held for up to %s s",
            self._config.source, self._mountpoint, os.getpid(), _policy(self._config).interval_s, f"{timeout_s:g}",
        )  # fmt: skip
        self._started.serving()
        self._service.ready()

    # ---- signals

    async def _mind_signals(self, nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
            asked = 0
            async for number in signals:
                if number == signal.SIGUSR1:
                    self._dump()
                    continue
                # A terminal that hangs up asks once; it does not insist.
                asked += number != signal.SIGHUP
                if asked > 2 and self._detached:
                    await self._say_goodbye("detached")
                    _end_now(nursery)
                elif not self._detached:
                    await self._unmount(signal.Signals(number).name, nursery, insist=asked > 1)

    async def _unmount(self, why: str, nursery: trio.Nursery, *, insist: bool) -> None:
        """The first unmounts, or says who is in the way; the second takes no no for an answer; the third does not wait (P8)."""
        flags = syscalls.MNT_DETACH if insist else 0
        try:
            if not self._unmounted:
                await trio.to_thread.run_sync(syscalls.umount, self._mountpoint, flags)
            self._is_unmounted()
        except OSError as error:
            if error.errno != errno.EBUSY:
                log.error(  # noqa: TRY400 - the errno says it all
                    "%s: cannot unmount %s: %s", why, self._mountpoint, error_words(error.errno)
                )
                return
            users = await trio.to_thread.run_sync(diagnosis.users_of, self._mountpoint)
            held = sum(len(image.held.held) for image in self._requests.images.values())
            by = (
                ", ".join(users) or "a process that was killed and waits for its I/O, or one in another mount namespace"
            )
            log.warning(
                "%s: %s stays mounted, it is in use by %s (%d requests held). It is unmounted when they have ended within %g min. "
                "Stop them, or send the signal again to detach the mount and end what is held with an error.",
                why, self._mountpoint, by, held, _WHEN_FREE_S / 60,
            )  # fmt: skip
            self._service.asked_to_end(f"{why}: {self._mountpoint} stays mounted, it is in use by {by}")
            is_watched = trio.current_time() < self._free_by_s
            self._free_by_s = trio.current_time() + _WHEN_FREE_S
            if not is_watched:
                nursery.start_soon(self._unmount_when_free)
            return
        if not insist:
            return
        self._detached = True
        self._service.asked_to_end("detached; open files are being closed")
        self._requests.hold_no_more()
        log.warning("%s again: %s is detached; held requests have their errors. Open files have %g s to be closed.",
                    why, self._mountpoint, _LAST_CLOSE_S)  # fmt: skip
        nursery.start_soon(self._end, nursery)

    def _is_unmounted(self) -> None:
        # We end when the kernel says that the last copy of the mount is gone. A service with a mount namespace of its
        # own (systemd's PrivateTmp= and the like) may have one for as long as it runs.
        self._unmounted = True
        self._service.asked_to_end("unmounted; serving those who still use it")

    async def _unmount_when_free(self) -> None:
        """Guests that are shutting down leave one by one; systemd sends its signal once."""
        while trio.current_time() < self._free_by_s:
            await trio.sleep(1)
            if self._unmounted or self._detached:
                return
            if not self._on_top():  # `umount -l` was faster
                self._is_unmounted()
                return
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(syscalls.umount, self._mountpoint, 0)
                self._is_unmounted()
                return
        self._service.goes_on()
        log.warning("%s is still in use, and stays mounted", self._mountpoint)

    def _on_top(self) -> bool:
        """Whether it is us whom umount(2) would take away there, and not what somebody has mounted since."""
        there = [mounted for mounted in diagnosis.mount_table() if mounted.mountpoint == self._mountpoint]
        return bool(there) and there[-1].device_minor == self._device_minor

    async def _end(self, nursery: trio.Nursery) -> None:
        """Time for the last close, and as long as it takes for writes inside a system call: ending would answer them (P5)."""
        await trio.sleep(_LAST_CLOSE_S)
        while stuck := self._requests.writes_in_flight():
            log.warning(
                "%d writes or fsyncs are inside a system call of SOURCE that has not returned: %s. They are answered when it does. "
                "Send the signal once more to end without them: their consumers get an error, and the data may still land.",
                sum(stuck.values()), ", ".join(f"{name} ({count})" for name, count in stuck.items()),
            )  # fmt: skip
            for _ in range(round(_LAST_CLOSE_S)):
                await trio.sleep(1)
                if not self._requests.writes_in_flight():
                    break
        await self._say_goodbye("detached")
        _end_now(nursery)

    async def _say_goodbye(self, why: str) -> None:
        self._service.ending(f"{self._mountpoint} is {why}")
        if self._monitor is not None:
            self._monitor.shut_down(why)
            await trio.sleep(0.05)  # for the word to go out

    # ---- what the log gets

    def _log_event(self, event: Event) -> None:
        level, text = sentence(event, diagnosis.wall_clock)
        log.log(level, "%s", text)

    def _dump(self) -> None:
        """SIGUSR1: everything that waits, and where every task and thread is."""
        for line in diagnosis.dump(self._requests, trio.current_time()):
            log.info("%s", line)


def _end_now(nursery: trio.Nursery) -> None:
    pyfuse3.terminate()
    nursery.cancel_scope.cancel()  # pyfuse3 would wait for each handler


def _policy(config: Config) -> Policy:
    timeouts = {
        Op.READ: config.read_timeout_s,
        Op.WRITE: config.write_timeout_s,
        Op.FSYNC: config.fsync_timeout_s,
    }
    shortest = min((t for t in timeouts.values() if t), default=0)
    return Policy(
        timeout_s=timeouts,
        interval_s=limits.effective_interval(shortest, config.interval_s),
        errors=config.errors | {errno.EAGAIN},  # EAGAIN: the process could not start a thread, which passes
        timeout_errno=config.timeout_errno,
        recovery_gate=config.recovery_gate,
        blocked_after_s=config.blocked_after_s,
    )
