"""A mount from its beginning to its end, and what it is made of.

One order: everything that can be refused is checked before anything is done (preflight.py); then into the background; then the
mount; then the parent is told. unmounting.py is the reverse.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from iohang_fuse import __version__, background, limits, logs, preflight, presence, receiver, source, syscalls
from iohang_fuse.commands import About, Commands
from iohang_fuse.config import MONITOR, Config
from iohang_fuse.engine import Engine, Unavailable
from iohang_fuse.eventlog import EventLog
from iohang_fuse.events import Op
from iohang_fuse.exposition import Exposition
from iohang_fuse.filesystem import Filesystem
from iohang_fuse.messages import error_words, printable
from iohang_fuse.metrics import Metrics
from iohang_fuse.monitor import Monitor
from iohang_fuse.mountwords import libfuse_escaped
from iohang_fuse.notify import Notify
from iohang_fuse.preflight import EX_FAILURE, EX_SYSTEM, SUBTYPE, Refusal
from iohang_fuse.reconnect import Reconnect
from iohang_fuse.rehandle import Policy
from iohang_fuse.requests import Requests
from iohang_fuse.service import Service
from iohang_fuse.unmounting import Unmounting

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


def run(config: Config, *, foreground: bool, fake: bool = False, verbose: bool = False) -> int:
    """Mount and serve. Returns the exit code: of the server in the foreground, of the start in the background."""
    # In the background nobody is told: a NOTIFY_SOCKET there is that of somebody else, who called mount(8).
    notify = Notify.from_environment() if foreground else Notify()
    try:
        if not fake:
            preflight.wait_for_source(config, functools.partial(preflight.say_waiting, notify))
        mountpoint = preflight.check_paths(config)
        preflight.check_log(config)
        limits.raise_open_files()
        preflight.check_limits(config)
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
            engine=engine,
        )
        if engine.ring is not None:
            self._requests.others_wait = receiver.others_wait
            engine.request_waits = receiver.request_waits
        self._about = About(str(config.source), mountpoint, __version__, os.getpid())
        self._monitor = self._make_monitor()
        self._service = Service(notify, self._requests, f"serving {config.source} at {mountpoint}")
        self._requests.listen(self._service.tell)
        self._metrics: Exposition | None = None
        self._serving = False
        self._unmounting = Unmounting(mountpoint, self._requests, self._service, say_goodbye=self._say_goodbye)
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
            serving=lambda: self._serving and not self._unmounting.detached,
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
        reconnect = None
        if config.reconnect == "auto":
            # It looks at SOURCE's path: before anybody waits for us.
            reconnect = Reconnect(self._requests, str(config.source))
            self._requests.settle, self._requests.hasten = reconnect.settle, reconnect.hasten
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
                nursery.start_soon(filesystem.serve)
                nursery.start_soon(self._requests.serve, nursery)
                nursery.start_soon(self._unmounting.serve, nursery, functools.partial(_end_now, nursery))
                nursery.start_soon(_aside, self._event_log.serve)
                nursery.start_soon(self._announce)
                nursery.start_soon(_aside, self._service.serve)
                if reconnect is not None:
                    nursery.start_soon(_aside, reconnect.serve)
                if self._monitor is not None:
                    nursery.start_soon(_aside, self._monitor.serve)
                await receiver.main(filesystem)
                await self._unmounting.say_goodbye("unmounted")
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
            self._unmounting.device_minor = os.minor(status.st_dev)
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
        for problem in preflight.limit_problems(self._config):
            log.warning("%s", problem.text)
        unmounted = presence.unmounted_plan(str(self._config.source))
        if unmounted is not None:
            log.warning("%s: what is served is the directory beneath. See iohangctl doctor, and wait_source", unmounted)
        engine = self._requests.engine
        log.info("data I/O: engine %s%s", engine.name, f" ({engine.why_not})" if engine.why_not else "")
        timeout_s = preflight.longest_timeout_s(self._config)
        log.info(
            "%s is served at %s by process %d: a failed request is tried every %g s and held for up to %s s",
            self._config.source, self._mountpoint, os.getpid(), _policy(self._config).interval_s, f"{timeout_s:g}",
        )  # fmt: skip
        self._serving = True
        self._started.serving()
        self._service.ready()

    def _say_goodbye(self, why: str) -> None:
        if self._monitor is not None:
            self._monitor.shut_down(why)


async def _aside(serve: Callable[[], Awaitable[None]]) -> None:
    """What the disks can do without: a bug in it ends it alone (P11)."""
    try:
        await serve()
    except Exception:
        log.exception("a bug; the mount goes on without %s", serve.__qualname__)


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
        "reconnect": config.reconnect,
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
