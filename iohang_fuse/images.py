"""An image as the shell knows it: an open inode of SOURCE, with its handles, and what is under way on it.

1. An image exists from the first open to the last close, whichever handles are open on it. requests.py makes and ends it.
2. Linux reports a failed writeback once to each open file description. So an image has one that is for syncs alone, its
   *witness*: open since before anything in the log was written, and used by one sync at a time, it misses no report.
3. What is here waits for nothing, and decides nothing about requests.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import trio

from iohang_fuse.rehandle import HeldBytes, Policy, RehandleList, Request
from iohang_fuse.writelog import SAMPLES, WriteLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.backing import Backing
    from iohang_fuse.source import Where
    from iohang_fuse.tally import Tally


class Opening:
    """An open(2) of an image's file under way, for a description to replace a dead one or for a witness.

    NFS 4 has it wait without bound for a lease to be renewed, and for the end of a server's grace period, while reads and writes
    fail or work. It writes nothing, so whoever waits for it may be answered before it returns.
    """

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.over = trio.Event()
        self.error: Exception | None = None


class Image:
    """One open inode: its handles, its rehandle list, its write log, and its attributes as last seen."""

    def __init__(
        self, node_id: int, name: str, policy: Policy, held_bytes: HeldBytes, write_log: int, tally: Tally | None = None
    ) -> None:
        self.node_id = node_id
        self.held = RehandleList(name, policy, held_bytes, tally)
        self.log = WriteLog(write_log)
        self.handles: dict[int, Handle] = {}
        self.where: Callable[[int], Where] | None = None  # how to find it by its name, given the size that is stable
        self.stable_size = 0
        # Where it has no lasting handle, what it is known by: (first byte, data), stable, that nobody has tried to change since.
        self.sampled = True
        self.set_id = False  # whether it may have set-ID bits
        self.samples: list[tuple[int, bytes]] = []
        self.capability: bytes | int | None = None  # security.capability, or the errno it gave; None: not yet asked
        self.timer: trio.CancelScope | None = None  # of the task that calls `tick`, while the image is sick
        self.renewals = 0  # how often it was opened anew
        self.worn = False  # something has failed on it since then
        self.refusal = ""  # why it could not be opened anew, as last reported
        self.syncing = False  # whether the server syncs by itself
        self.writing: dict[Request, tuple[int, float]] = {}  # first byte and end, of the attempts in flight
        self.recovering = False  # the log is being written again
        self.sync_in_flight = False
        self.opening: Opening | None = None  # one at a time, so that they never have more than one thread
        self.bystanders = trio.lowlevel.ParkingLot()  # who waits for one of those four to change
        self.syncs = 0  # that have begun
        self.synced = {True: 0, False: 0}  # the latest of these that has succeeded, for data alone and for all
        self.resizes = 0  # changes of size that have begun or ended
        self.witness: Backing | None = None
        self.no_witness = False  # it could not be had
        self._stat: os.stat_result | None = None
        self.size = 0  # as it is since those attributes were read, by what has been written and cut
        self.questions: set[trio.Event] = set()  # of those who wait for SOURCE's word on attributes: see questions.py
        self.unanswered = 0  # of which nobody waits for the word any more, and it has not come

    def saw(self, attributes: os.stat_result) -> None:
        """Remember attributes that SOURCE has just given."""
        self._stat, self.size = attributes, attributes.st_size
        self.set_id |= bool(attributes.st_mode & (stat.S_ISUID | stat.S_ISGID))  # what is read here may be older

    def writes(self, request: Request, start: int, end: float) -> None:
        """An attempt to change these bytes begins."""
        self.writing[request] = start, end
        if self.samples:
            self.samples = [(at, data) for at, data in self.samples if end <= at or at + len(data) <= start]

    def writes_no_more(self, request: Request) -> None:
        """It is over."""
        del self.writing[request]
        if self.bystanders:
            self.bystanders.unpark_all()

    def wrote(self, end: int) -> None:
        """A write up to *end* has succeeded."""
        self.size = max(self.size, end)

    def truncated(self, size: int) -> None:
        """The size was changed."""
        self.size = size
        self.log.truncate(size)

    def remembered(self) -> tuple[os.stat_result, int] | None:
        """Attributes from memory and the size with them, for `stat` while the image hangs."""
        return None if self._stat is None else (self._stat, self.size)

    @property
    def speaks_from_memory(self) -> bool:
        """Whether SOURCE is not to be asked for attributes: it would not answer, and memory can."""
        return self._stat is not None and (self.held.sick or self.unanswered > 0)

    def open_witness(self, writer: Backing, transient: frozenset[int]) -> None:
        """Open the witness, if it can be had. In a thread, before anything is written.

        Raises what is *transient*. Nothing else is a reason to fail a write: who may open the file no more, no descriptor left,
        a file system that finds an unlinked file no more.
        """
        try:
            self.witness = writer.another()
        except OSError as error:
            if error.errno in transient:
                raise
            self.no_witness = True

    def to_sync(self, handle: Handle) -> Backing | None:
        """What a sync on *handle* has to sync. None if it was closed while its request waited, and nobody may write any more."""
        if self.witness is None and self.log:  # there could not be one: a handle that can write what is in the log
            handle = next((other for other in self.handles.values() if other.writable), handle)
        if self.witness is None and handle.number not in self.handles:
            return None
        return self.witness or handle.backing

    def writers(self, besides: Backing) -> list[Backing]:
        """The backing files through which the image may be written, but for one."""
        return [h.backing for h in self.handles.values() if h.writable and h.backing is not besides]

    def resizing(self, size: int) -> None:
        """A change of size is about to be tried."""
        self.resizes += 1
        self.stable_size = min(self.stable_size, size)

    def doubt(self) -> None:
        """Something on it has failed: what its descriptions have still to report is unknown, and they may be dead."""
        self.log.doubt()
        self.worn = True

    def made_stable(self, mark: int, resizes: int, size: int) -> None:
        """A sync has succeeded that began at *mark*; the file had *size* bytes then, and had been resized so often."""
        if self.sampled:
            kept = [
                (start, data)
                for start, data in self.log.samples(mark)
                if not any(first < start + len(data) and start < end for first, end in self.writing.values())
            ]
            self.samples = [*kept, *self.samples][:SAMPLES]
        end = self.log.release(mark)
        if self.resizes == resizes:  # no more than was acknowledged: what lies in a cache may still be lost
            self.stable_size = max(self.stable_size, min(size, end))


class Handle:
    """One open of an image. Its backing descriptors live until the last attempt on them has returned."""

    def __init__(self, number: int, image: Image, backing: Backing, flags: int) -> None:
        self.number = number
        self.image = image
        self.backing = backing
        self.direct = bool(flags & os.O_DIRECT)  # as the consumer opened it
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.in_use = 0
        self.idle = trio.Event()

    def returned(self) -> None:
        """An attempt on this handle has returned."""
        self.in_use -= 1
        if self.in_use == 0:
            self.idle.set()
