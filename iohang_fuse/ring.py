"""io_uring(7), as far as the engine needs it: reads and writes that are handed to the kernel, and what became of them.

1. Nothing here waits, and nothing is decided. It knows descriptors and bytes: no image, no request, no trio.
2. Each operation has IOSQE_ASYNC. Without it the kernel may begin one in io_uring_enter(2) itself, on the event loop: with
   RWF_NOWAIT where it believes that the file has that, and on FUSE, whose files can be polled, even without
   (io_file_supports_nowait in io_uring/rw.c). There a write waits for the inode's lock, which one that hangs may have.
3. What the kernel works on stays in memory until the kernel is done with it, whoever gave up waiting: `_aloft`.
4. The queues are memory that we share with the kernel. What we put there it sees, because it looks in a system call that we make
   afterwards. What it puts there we read only after a step that orders memory between the look at its index and at the entry:
   giving a lock back and taking it again.
5. One thread alone may use a ring.

Why not a library: caio, the one that is kept, can set no flags: without IOSQE_ASYNC see 2, and without IOSQE_IO_LINK there are no
replies (`Ring.read`).
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import mmap
import os
import struct
import threading
from typing import Any, Protocol, TypeAlias, cast

log = logging.getLogger(__name__)

# The numbers are those of linux/io_uring.h; they are the same on all architectures.
_SETUP, _ENTER, _REGISTER = 425, 426, 427
_OP_READ, _OP_WRITE = 22, 23
_SQE_LINK, _SQE_ASYNC, _SQE_CQE_SKIP_SUCCESS = 1 << 2, 1 << 4, 1 << 6
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_SETUP_CLAMP, _SETUP_COOP_TASKRUN, _SETUP_TASKRUN_FLAG = 1 << 4, 1 << 8, 1 << 9
_FEATURES = 1 << 0 | 1 << 1 | 1 << 3  # SINGLE_MMAP, NODROP, RW_CUR_POS: Linux 5.6, the first with all that is used here
_FEATURE_CQE_SKIP = 1 << 11
_SQ_TASKRUN = 1 << 2
_CQ_EVENTFD_DISABLED = 1 << 0
_REGISTER_EVENTFD = 4
_REGISTER_IOWQ_MAX_WORKERS = 19

_WAYS = (_SETUP_COOP_TASKRUN | _SETUP_TASKRUN_FLAG, 0)
"""The first one since Linux 5.19: what the kernel's threads do not finish themselves is finished at our next system call. Never
IORING_SETUP_DEFER_TASKRUN: there a reply waits until we look (io_free_batch_list in io_uring/io_uring.c), and is not made by the
thread that has read."""

# opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data; the rest stays 0
_SQE = struct.Struct("=BBHiQQIIQ")
_SQE_BYTES = 64
_CQE = struct.Struct("=Qi")  # user_data, result; then flags
_CQE_BYTES = 16
_MASK = 0xFFFFFFFF

# PyDLL keeps the interpreter's lock: giving it up would cost more than the call.
_call = ctypes.PyDLL(None, use_errno=True).syscall
_call.restype = ctypes.c_long
_enter = ctypes.PyDLL(None, use_errno=True).syscall
_enter.argtypes = (
    ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t,
)  # fmt: skip
_enter.restype = ctypes.c_long
# With NULL "the contents of the bytes object are uninitialized" (Python/C API, Bytes Objects).
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_copy = ctypes.memmove
_address = ctypes.pythonapi.PyBytes_AsString
_address.argtypes, _address.restype = (ctypes.py_object,), ctypes.c_void_p


LARGE_BYTES = 128 << 10
"""Above that, a new `bytes` for each read would cost more in page faults than the read."""

_LARGEST_BYTES = 1 << 20  # FUSE's largest read
_MOST_BUFFERS = 16  # that are kept for the next ones


class _Buffer:
    """Memory for one large read, again and again; in front of it there is room for a head."""

    __slots__ = ("address", "view")

    def __init__(self) -> None:
        memory = mmap.mmap(-1, mmap.PAGESIZE + _LARGEST_BYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + mmap.PAGESIZE
        self.view = memoryview(memory)[mmap.PAGESIZE :]


Reply: TypeAlias = tuple[int, bytes]
"""Where what is read goes to: a descriptor, and a head of up to a page for what is written there at once."""


class Operation(Protocol):
    """Who is told what became of an operation."""

    def done(self, result: int, data: bytes | None) -> None:
        """*result*: the count of bytes, or an errno negated. *data*: the bytes, of which as many count.

        None with a count: the reply was made. None with an error: the kernel may still be about to use the descriptor.
        """


class _Replied:
    """A read with a reply. The kernel tells of one of both: of the reply, or of the read that has not got all."""

    __slots__ = ("head_bytes", "memory", "operation", "read_number", "size", "told")

    def __init__(self, operation: Operation, size: int, head_bytes: int, memory: bytes | _Buffer) -> None:
        self.operation = operation
        self.size = size
        self.head_bytes = head_bytes
        self.memory = memory
        self.read_number = 0
        self.told = False


_aloft: dict[int, tuple[Operation | _Replied, bytes | _Buffer | None]] = {}
"""Operations of all rings by their numbers: so the bytes outlive even a ring that nobody has any more. A reply, whose number is one
more than its read's, has none."""


_numbers = itertools.count(1)


class _Offsets(ctypes.Structure):
    """struct io_sqring_offsets, and io_cqring_offsets, which has its entries and its flags in the sixth and seventh place."""

    _fields_ = (
        ("head", ctypes.c_uint32), ("tail", ctypes.c_uint32), ("mask", ctypes.c_uint32), ("entries", ctypes.c_uint32),
        ("fifth", ctypes.c_uint32), ("cqes", ctypes.c_uint32), ("array", ctypes.c_uint32), ("resv", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
    )  # fmt: skip


class _Params(ctypes.Structure):
    """struct io_uring_params."""

    _fields_ = (
        ("sq_entries", ctypes.c_uint32), ("cq_entries", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("sq_thread_cpu", ctypes.c_uint32), ("sq_thread_idle", ctypes.c_uint32), ("features", ctypes.c_uint32),
        ("wq_fd", ctypes.c_uint32), ("resv", ctypes.c_uint32 * 3), ("sq", _Offsets), ("cq", _Offsets),
    )  # fmt: skip


class Ring:
    """A submission queue and a completion queue."""

    def __init__(self, entries: int) -> None:
        """For *entries* operations between two calls of `hand_over`, and twice as many under way.

        Raises OSError: ENOSYS, EPERM, ENOMEM as io_uring_setup(2) says, ENOTSUP before Linux 5.6.
        """
        # poll(2) on the ring itself does not hear of deferred work.
        self.fileno = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._fd, params = _set_up(entries)
        except BaseException:
            os.close(self.fileno)
            raise
        try:
            eventfd = ctypes.c_int(self.fileno)
            _check(_call(ctypes.c_long(_REGISTER), self._fd, _REGISTER_EVENTFD, ctypes.byref(eventfd), 1))
            if params.features & _FEATURES != _FEATURES:
                raise OSError(errno.ENOTSUP, "io_uring of a Linux before 5.6")
            self.entries: int = params.sq_entries
            # Before Linux 5.19 a read under way would keep /dev/fuse open, too, after the end of the mount.
            self._replies = bool(params.features & _FEATURE_CQE_SKIP and params.flags & _SETUP_COOP_TASKRUN)
            size = max(params.sq.array + 4 * params.sq_entries, params.cq.cqes + _CQE_BYTES * params.cq_entries)
            self._ring = mmap.mmap(self._fd, size, offset=_OFF_SQ_RING)
            self._sqes = mmap.mmap(self._fd, params.sq_entries * _SQE_BYTES, offset=_OFF_SQES)
        except BaseException:
            os.close(self._fd)
            os.close(self.fileno)
            raise
        self._words = words = memoryview(self._ring).cast("I")
        words[params.sq.array // 4 : params.sq.array // 4 + self.entries] = memoryview(
            struct.pack(f"={self.entries}I", *range(self.entries))
        ).cast("I")  # entry n of the array is always n
        self._sq_tail, self._sq_flags = params.sq.tail // 4, params.sq.fifth // 4
        self._cq_head, self._cq_tail, self._cqes = params.cq.head // 4, params.cq.tail // 4, params.cq.cqes
        self._cq_flags = params.cq.array // 4
        self._sq_mask, self._cq_mask = self.entries - 1, params.cq_entries - 1
        self._tail = self._handed_over = words[self._sq_tail]
        self._head = words[self._cq_head]
        self._is_cut = False  # a link, between what was handed over last and what is next
        self._buffers: list[_Buffer] = []
        self._lent: list[_Buffer] = []  # until the next `hand_over`
        self._order = threading.Lock()
        self._order.acquire()

    def __del__(self) -> None:
        if hasattr(self, "_words"):
            os.close(self._fd)
            os.close(self.fileno)

    def allow_workers(self, count: int) -> None:
        """Let the kernel have *count* threads for regular files. Raises EINVAL before Linux 5.15."""
        counts = (ctypes.c_uint32 * 2)(count, 0)  # 0, for what is not a regular file: as it is
        _check(_call(ctypes.c_long(_REGISTER), self._fd, _REGISTER_IOWQ_MAX_WORKERS, ctypes.byref(counts), 2))

    @property
    def room(self) -> int:
        """For so many operations before the next `hand_over`."""
        return int(self.entries - (self._tail - self._handed_over & _MASK))

    def read(self, operation: Operation, fd: int, offset: int, size: int, reply: Reply | None = None) -> None:
        """Have *size* bytes at *offset* read. There must be `room`, for two with a *reply*.

        What is larger than `LARGE_BYTES` is told as a view of memory that the next `hand_over` takes back. The *reply* is made
        where all of them were read: by the thread of the kernel's that has read them, while nobody here need be awake.
        """
        buffer = None
        if LARGE_BYTES < size <= _LARGEST_BYTES:
            buffer = self._buffers.pop() if self._buffers else _Buffer()
        if reply is None or not self._replies:
            data: bytes | _Buffer = cast("bytes", _new_bytes(None, size)) if buffer is None else buffer
            address = _address(data) if buffer is None else buffer.address
            self._put(_OP_READ, operation, fd, offset, size, address, data)
            return
        to, head = reply
        count = len(head)
        if buffer is None:
            data = cast("bytes", _new_bytes(None, count + size))
            address = _address(data)
        else:
            data = buffer
            address = buffer.address - count
        _copy(address, head, count)
        both = _Replied(operation, size, count, data)
        flags = _SQE_ASYNC | _SQE_LINK | _SQE_CQE_SKIP_SUCCESS
        both.read_number = self._put(_OP_READ, both, fd, offset, size, address + count, data, flags)
        self._put(_OP_WRITE, both, to, 0, count + size, address, None)

    def write(self, operation: Operation, fd: int, offset: int, data: bytes) -> None:
        """Have *data* written at *offset*. There must be `room`."""
        self._put(_OP_WRITE, operation, fd, offset, len(data), _address(data), data)

    def _put(
        self,
        opcode: int,
        operation: Operation | _Replied,
        fd: int,
        offset: int,
        size: int,
        address: int,
        data: bytes | _Buffer | None,
        flags: int = _SQE_ASYNC,
    ) -> int:
        number = next(_numbers)
        _SQE.pack_into(
            self._sqes, (self._tail & self._sq_mask) * _SQE_BYTES,
            opcode, flags, 0, fd, offset, address, size, 0, number,
        )  # fmt: skip
        _aloft[number] = operation, data
        self._tail = self._tail + 1 & _MASK
        return number

    def hand_over(self) -> None:
        """Give the kernel what was put on the ring. What it does not take, for want of memory, is done with EAGAIN.

        So is what comes after it.
        """
        if self._lent:
            self._buffers += self._lent[: _MOST_BUFFERS - len(self._buffers)]
            self._lent.clear()
        while self._tail != self._handed_over:
            if not self._submit():
                self._take_back()
                return

    def hurry(self) -> None:
        """Have the kernel begin with what is there, while others put more there. What it does not take waits for `hand_over`."""
        self._submit()

    def _submit(self) -> bool:
        """Whether the kernel has taken all, or may take more."""
        if self._is_cut:
            return False
        self._words[self._sq_tail] = self._tail
        count = self._tail - self._handed_over & _MASK
        while (taken := _enter(_ENTER, self._fd, count, 0, 0, None, 0)) <= 0:
            if taken == 0 or ctypes.get_errno() != errno.EINTR:
                return False
        self._handed_over = self._handed_over + taken & _MASK
        # A read alone was taken: its reply, handed over now, would not wait for it.
        self._is_cut = taken < count and bool(self._flags_of(self._handed_over - 1) & _SQE_LINK)
        return not self._is_cut

    def _flags_of(self, place: int) -> int:
        return int(self._sqes[(place & self._sq_mask) * _SQE_BYTES + 1])

    def _take_back(self) -> None:
        refused = []
        while self._tail != self._handed_over:
            self._tail = self._tail - 1 & _MASK
            number = _SQE.unpack_from(self._sqes, (self._tail & self._sq_mask) * _SQE_BYTES)[-1]
            refused.append(_aloft.pop(number))
        self._words[self._sq_tail] = self._tail
        self._is_cut = False
        for operation, data in reversed(refused):
            if type(operation) is _Replied and data is None and not operation.told:
                # The read alone was taken, and nobody is told of it: its memory stays `_aloft`, a loss of a MiB at most.
                operation.told = True
                self._tell(operation.operation, -errno.EAGAIN, None)
            else:
                self._tell(operation, -errno.EAGAIN, data)
        os.eventfd_write(self.fileno, 1)  # who was told may have work for a loop that is just about to wait

    def about_to_wait(self) -> None:
        """`hand_over`, after which `fileno` is readable as soon as there is something to collect."""
        if self._cq_flags:  # since Linux 5.8
            self._words[self._cq_flags] = 0
        # A system call orders this and the look at the queue: what is not in it then, is signalled. (Linux has a barrier between
        # both, too: wq_has_sleeper, called by io_cqring_wake in io_uring/io_uring.h.)
        if self._tail == self._handed_over:
            _enter(_ENTER, self._fd, 0, 0, 0, None, 0)
        self.hand_over()
        if self.is_done():
            os.eventfd_write(self.fileno, 1)

    def is_done(self) -> bool:
        """Whether there is something to collect."""
        return self._words[self._cq_tail] != self._head or bool(self._words[self._sq_flags] & _SQ_TASKRUN)

    def waited(self) -> None:
        """Nobody looks at `fileno` now, so the kernel need not signal it."""
        if self._cq_flags:
            self._words[self._cq_flags] = _CQ_EVENTFD_DISABLED

    def collect(self) -> None:
        """Tell those whose operations are done."""
        words = self._words
        for _ in range(self._cq_mask):  # others are done meanwhile
            tail = words[self._cq_tail]
            if tail == self._head:
                return
            self._order.release()
            self._order.acquire()
            while self._head != tail:
                number, result = _CQE.unpack_from(self._ring, self._cqes + (self._head & self._cq_mask) * _CQE_BYTES)
                self._head = words[self._cq_head] = self._head + 1 & _MASK
                operation, data = _aloft.pop(number)
                self._tell(operation, result, data)

    def _tell(self, operation: Operation | _Replied, result: int, memory: bytes | _Buffer | None) -> None:
        made = False
        if type(operation) is _Replied:
            both = operation
            if both.told:
                return
            both.told = True
            operation = both.operation
            if memory is None:
                _aloft.pop(both.read_number, None)
                made = result == both.head_bytes + both.size
                result, memory = both.size, both.memory
            else:
                _aloft.pop(both.read_number + 1, None)  # it may have been refused
            if type(memory) is bytes and not made:
                memory = memory[both.head_bytes :]
        if type(memory) is _Buffer:
            self._lent.append(memory)
            data: Any = memory.view[: max(result, 0)]  # nobody changes it, and nobody keeps it
        else:
            data = memory
        try:
            operation.done(result, None if made else data)  # type: ignore[union-attr]
        except Exception:  # a bug costs one operation, and not those that are told after it (P11)
            log.exception("a bug in what is done with an operation of io_uring; the mount stays")


def _set_up(entries: int) -> tuple[int, Any]:
    for way in _WAYS:
        params = _Params(flags=way | _SETUP_CLAMP)
        fd = _call(ctypes.c_long(_SETUP), ctypes.c_uint(entries), ctypes.byref(params))
        if fd >= 0:
            return fd, params
        if ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    raise OSError(errno.ENOTSUP, "io_uring of a Linux before 5.6")


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
