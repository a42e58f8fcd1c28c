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
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from iohang_fuse import __version__, background, diagnosis, limits, logs, presence, receiver, source, syscalls
from iohang_fuse.commands import About, Commands
from iohang_fuse.config import MONITOR, Config
from iohang_fuse.engine import Engine, Unavailable
from iohang_fuse.eventlog import EventLog
from iohang_fuse.events import Op
from iohang_fuse.exposition import Exposition
from iohang_fuse.filesystem import Filesystem
from iohang_fuse.messages import error_words, printable, span_words
from iohang_fuse.metrics import Metrics
from iohang_fuse.monitor import Monitor
from iohang_fuse.mountwords import libfuse_escaped
from iohang_fuse.notify import Notify
from iohang_fuse.rehandle import Policy
from iohang_fuse.requests import Requests
from iohang_fuse.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

SUBTYPE = "iohang-mount"  # findmnt shows fuse.iohang-mount: the type that fstab has, too
EX_USAGE, EX_SYSTEM, EX_INTERRUPTED, EX_FAILURE = 1, 2, 8, 32  # mount(8), EXIT STATUS

_WHEN_FREE_S = 600.0
"""After a first SIGTERM that found the mount in use: how long it is unmounted as soon as it is free. Long enough for guests to
shut down; not for ever, or a SIGTERM that everybody has forgotten would take the mount away between two runs of a guest."""

_START_EXTENSION_S = 60.0
"""What a start that waits for SOURCE asks for each ten seconds, so that systemd's TimeoutStartSec= does not end it."""

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
        if not fake:
            wait_for_source(config, functools.partial(say_waiting, notify))
        mountpoint = check_paths(config)
        check_log(config)
        limits.raise_open_files()
        check_limits(config)
    except Refusal as refusal:
        _complain(str(refusal))
        notify.tell(STATUS=refusal)
        return refusal.code
    if fake:
        return 0
    level = logging.DEBUG if verbose else logging.getLevelNamesMapping()[config.log_level.upper()]
    if foreground:
        complain_too = _complain if config.log is not None else None  # stderr has what is logged otherwise
        with logs.to_stderr_or(config.log, level=level):
            return _serve(config, mountpoint, started=background.NoParent(complain_too), notify=notify)
    return background.run(
        lambda started: _in_background(config, mountpoint, level, started=started),
        complain=_complain,
    )


def _complain(text: str) -> None:
    print(f"iohang-mount: {printable(text)}", file=sys.stderr)  # noqa: T201


def _in_background(config: Config, mountpoint: str, level: int, *, started: background.Started) -> int:
    with logs.to_syslog_or(config.log, level=level):
        return _serve(config, mountpoint, started=started, notify=Notify())


# ---- checks


def wait_for_source(config: Config, tell: Callable[[str, float], None]) -> None:
    """As long as `wait_source` says. Raises `Refusal`. *tell* is that of `presence.wait`.

    Before anything else is done, in the process that was started: whoever waits for it sees what it waits for, and can end it.
    """
    if not config.wait_source_s:
        return
    try:
        presence.wait(str(config.source), config.wait_source_s, tell)
    except presence.NeverCame as error:
        raise Refusal(EX_FAILURE, str(error)) from None
    except KeyboardInterrupt:
        raise Refusal(EX_INTERRUPTED, f"interrupted while it waited for SOURCE {config.source} (wait_source)") from None


def say_waiting(notify: Notify, what: str, left_s: float) -> None:
    """What is waited for; and a service manager gives the start more time, until the next word in ten seconds."""
    said = f"{what}; waiting for up to {span_words(left_s)}"
    print(f"iohang-mount: {said}", file=sys.stderr, flush=True)  # noqa: T201
    notify.extend_timeout(_START_EXTENSION_S, STATUS=said)


def check_paths(config: Config) -> str:
    """The mount point without symlinks. Raises `Refusal` if SOURCE or MOUNTPOINT cannot be what they are given as.

    MOUNTPOINT is neither opened nor listed: on an automount that would wait for the mount that we are.
    """
    _check_directory("SOURCE", str(config.source), "name the directory of the images")
    origin = os.path.realpath(config.source)
    mountpoint = os.path.realpath(config.mountpoint)
    for mounted in presence.mount_table():
        if mounted.mountpoint == mountpoint and mounted.fstype == f"fuse.{SUBTYPE}":
            state = "" if _answers(mountpoint) else ", and its server is gone; `umount` it first"
            raise Refusal(EX_FAILURE, f"{mountpoint} is already an iohang-mount of {mounted.source}{state}")
    _check_directory("MOUNTPOINT", mountpoint, "make it with mkdir(1)")
    if origin == mountpoint:
        raise Refusal(EX_FAILURE, f"SOURCE and MOUNTPOINT are both {origin}; name two directories")
    if _lies_in(origin, mountpoint):
        raise Refusal(
            EX_FAILURE,
            f"SOURCE {origin} lies under MOUNTPOINT {mountpoint}: the mount would hide it; mount elsewhere",
        )
    if _lies_in(mountpoint, origin):
        raise Refusal(
            EX_FAILURE,
            f"MOUNTPOINT {mountpoint} lies under SOURCE {origin}: the mount would show itself; mount elsewhere",
        )
    return mountpoint


def _check_directory(what: str, path: str, right: str) -> None:
    """Raises `Refusal` unless *path* is one. stat(2) neither opens it nor sets off an automount."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise Refusal(EX_FAILURE, f"{what} {path} does not exist; {right}") from None
    except OSError as error:
        raise Refusal(EX_FAILURE, f"{what} {path}: {error_words(error.errno)}") from None
    if not stat.S_ISDIR(mode):
        raise Refusal(EX_FAILURE, f"{what} {path} is not a directory; name one")


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
            logs.touch(config.log)
        except OSError as error:
            raise Refusal(
                EX_USAGE, f"log {config.log} cannot be written: {error_words(error.errno)}; name a file"
            ) from None


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
        self._event_log = EventLog(mountpoint)
        self._requests = Requests(
            _policy(config),
            config.held_limit_bytes,
            [self._event_log.tell],
            write_log=config.write_log_bytes,
            price=limits.price_of_held_bytes(),
            engine=engine,
        )
        if engine.ring is not None:
            self._requests.others_wait = receiver.others_wait
        self._about = About(str(config.source), mountpoint, __version__, os.getpid())
        self._monitor = self._make_monitor()
        self._service = Service(notify, self._requests, f"serving {config.source} at {mountpoint}")
        self._requests.listen(self._service.tell)
        self._metrics: Exposition | None = None
        self._serving = False
        self._unmounted = False
        self._free_by_s = 0.0
        self._device_minor = 0
        self._detached = False
        self._refusal: Refusal | None = None

    def _make_monitor(self) -> Monitor | None:
        path = self._config.monitor_path
        if path is None:
            return None
        end = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
        commands = Commands(self._requests, self._about, end, _lasting_settings(self._config))
        major, minor, micro = (int(part) for part in __version__.split("."))
        monitor = Monitor(path, commands, (major, minor, micro))
        try:
            monitor.bind(self._config.monitor_group, self._has_lost)
        except OSError as error:
            words = f"monitor: no socket at {path}: {error_words(error.errno)}"
            if self._config.monitor != MONITOR:
                raise Refusal(EX_SYSTEM, f"{words}; say monitor=PATH, or monitor=none") from None
            log.warning("%s. The mount is served without a monitor; say monitor=PATH, or monitor=none", words)
            return None
        self._requests.listen(monitor.tell)
        return monitor

    def _make_metrics(self) -> Exposition | None:
        """They are there before the mount is, which may take a while where SOURCE is slow."""
        where = self._config.metrics_where
        if where is None:
            return None
        metrics = Metrics(
            self._requests,
            self._about,
            now=trio.lowlevel.current_clock().current_time,
            bugs=lambda: Filesystem.bugs,
            serving=lambda: self._serving,
            name_the_mount=isinstance(where, Path),
        )
        exposition = Exposition(metrics.render, where)
        try:
            exposition.bind()
        except OSError as error:
            usual = error.errno is not None and error.strerror == os.strerror(error.errno)
            words = error_words(error.errno) if usual else error.strerror
            other = "another file in a directory that is there" if isinstance(where, Path) else "another HOST:PORT"
            raise Refusal(EX_SYSTEM, f"metrics={self._config.metrics}: {words}; say {other}, or none") from None
        exposition.start()
        return exposition

    def _has_lost(self, mountpoint: str) -> bool:
        """Whether a server of *mountpoint* has been detached, so that this one is to be found where it was."""
        return mountpoint == self._mountpoint and not any(
            mounted.mountpoint == mountpoint and mounted.fstype == f"fuse.{SUBTYPE}"
            for mounted in presence.mount_table()
        )

    async def run(self) -> int:
        """Mount, serve until unmounted. Raises `Refusal` if the mount fails."""
        try:
            self._metrics = self._make_metrics()
            return await self._run()
        finally:
            if self._metrics is not None:
                self._metrics.stop()
            self._event_log.flush()
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
                nursery.start_soon(self._event_log.serve)
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
        unmounted = presence.unmounted_plan(str(self._config.source))
        if unmounted is not None:
            log.warning("%s: what is served is the directory beneath. See iohangctl doctor, and wait_source", unmounted)
        engine = self._requests.engine
        log.info("data I/O: engine %s%s", engine.name, f" ({engine.why_not})" if engine.why_not else "")
        timeout_s = _longest_timeout_s(self._config)
        log.info(
            "%s is served at %s by process %d: a failed request is tried every %g s and held for up to %s s",
            self._config.source, self._mountpoint, os.getpid(), _policy(self._config).interval_s, f"{timeout_s:g}",
        )  # fmt: skip
        self._serving = True
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
        self._serving = False
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
        there = [mounted for mounted in presence.mount_table() if mounted.mountpoint == self._mountpoint]
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

    def _dump(self) -> None:
        """SIGUSR1: everything that waits, and where every task and thread is."""
        for line in diagnosis.dump(self._requests, trio.current_time()):
            log.info("%s", line)


def _end_now(nursery: trio.Nursery) -> None:
    pyfuse3.terminate()
    nursery.cancel_scope.cancel()  # pyfuse3 would wait for each handler


def _lasting_settings(config: Config) -> dict[str, object]:
    """What `query-settings` tells beside the policy, as `Config` has it."""
    return {
        "held-limit": config.held_limit_bytes,
        "write-log": config.write_log_bytes,
        "max-background": config.max_background,
        "engine": config.engine,
        "direct": config.direct,
        "attr-timeout": config.attr_timeout_s,
        "mount-words": [*config.mount_words],
    }


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
