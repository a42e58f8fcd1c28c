"""How requests are taken from /dev/fuse: reads, writes and what comes with them are answered here, all others by pyfuse3.

1. pyfuse3 goes by libfuse, with a coroutine, a pipe and two copies of the data for each request. For names and attributes that is
   fine; for data it costs more than what is to be done about it.
2. So pyfuse3 gets the end of a socket in place of /dev/fuse, by which it is told what is for it, and answers. libfuse takes any
   descriptor on which a read gives it one request: there is never more than one in it at a time.
3. pyfuse3 finds what it waits with in its global `trio`. pyfuse3.asyncio replaces that in the same way: nothing of pyfuse3 is
   changed.
4. One task takes all requests, as long as there are any: a round of trio's loop for each costs more than all the rest of a small
   one. After some in a row trio has its turn all the same: answers, timers and signals do not wait for a busy guest (P7).
5. A healthy read or write has no task: what brings its attempt back answers it (`Device._begin`). What io_uring has done is
   answered before anything new is taken in that round: a guest is woken once for all of it, and waking a processor that sleeps
   costs more than an answer. What has failed, or must wait, goes on in a task of its own.
6. The numbers and structures are those of linux/fuse.h, which are the same on all architectures, and never change.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import gc
import logging
import mmap
import os
import queue
import select
import socket
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast

import pyfuse3
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

_More: TypeAlias = "Callable[[], Coroutine[Any, Any, Any]]"
"""What is left to do for an answer, to be called and awaited."""

log = logging.getLogger(__name__)

_FORGET, _READ, _WRITE, _GETXATTR, _INTERRUPT, _BATCH_FORGET = 2, 15, 16, 22, 36, 42

# fuse_in_header, and fuse_read_in or fuse_write_in: they have these fields in the same places.
# length, opcode, unique, node, uid, gid, pid, padding; handle, offset, size, flags, lock owner, flags, padding
_REQUEST = struct.Struct("=IIQQIIIIQQIIQII")
_COUNT = struct.Struct("=I")
_FORGOTTEN = struct.Struct("=QQ")
_HEADER_BYTES = 40
_NAME_AT = _HEADER_BYTES + 8  # behind fuse_getxattr_in
_CAPABILITY = b"security.capability\0"
_ANSWER = struct.Struct("=IiQ")  # fuse_out_header: length, error, unique
_INVAL_ENTRY = 3  # in place of an error
_NAME = struct.Struct("=QII")  # fuse_notify_inval_entry_out: node, length, flags
_SIZE = struct.Struct("=II")  # fuse_getxattr_out: size, padding
_WRITTEN = struct.Struct("=IiQII")  # and fuse_write_out: size, padding

_LARGEST_BYTES = 16 << 20
"""The kernel wants room for the largest write on which it has agreed with libfuse: 256 pages, of 64 KiB at most. What is not used
takes no memory."""

LARGE_BYTES = 64 << 10
"""What is larger is received where it stays, if it is as large as the one before: not to copy it is worth a guess."""

IN_A_ROW = 16
"""Requests between two rounds of trio's loop: 16 reads of 1 MiB from the page cache take some 3 ms."""

_SO_SNDBUFFORCE = 32  # asm-generic/socket.h

_SOCKET_BYTES = 256 << 10
"""Of what is under way to pyfuse3 and back, where a full socket would wait for us: extended attributes have 64 KiB at most, and one
is passed on before the next comes."""

_ANY_NUMBER = 1 << 30
"""Of pyfuse3's tasks: one for each of its requests that waits. At a limit nothing would be taken any more, close(2) included."""

NEW_OBJECTS = 20_000
"""Between two searches for garbage, instead of 700: some 5,000 writes, whose entries in the write log are no garbage for long, by
the way of 4k writes."""

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_address = ctypes.pythonapi.PyBytes_AsString
_address.argtypes, _address.restype = (ctypes.py_object,), ctypes.c_void_p
_memory = ctypes.pythonapi.PyMemoryView_FromMemory
_memory.argtypes, _memory.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


class Device:
    """/dev/fuse of one mount."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self._operations: Any = None
        self._nursery: trio.Nursery | None = None
        self._fd = self._reply_fd = -1
        self._ready = select.poll()
        self._over = False
        self._aloft = 0  # requests that no task waits for
        self._all_landed: trio.Event | None = None
        self._header = bytearray(_REQUEST.size)
        self._large = b""  # where the next request's data is received if it is as large as that
        self._rest = memoryview(mmap.mmap(-1, _LARGEST_BYTES))
        self._buffers: list[Any] = [self._header, self._rest]
        # pyfuse3's
        self._end: socket.socket | None = None  # ours of the pair; the other one is where it had /dev/fuse
        self._forwarded: deque[bytes] = deque()
        self._takers: list[trio.lowlevel.Task] = []
        self._received = memoryview(bytearray(_SOCKET_BYTES))
        self._answers = bytearray()
        self._notices: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    async def serve(self, operations: Any) -> None:
        """Until the mount is gone, or pyfuse3.terminate() is called, and what was taken is answered."""
        self._operations = operations
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                # None of its tasks ends before the others: it would not come to the `Gate` with its last answer.
                await pyfuse3.main(_ANY_NUMBER, _ANY_NUMBER)
                self._stop()
                if self._end is not None:
                    self.pass_on()
                    trio.lowlevel.notify_closing(self._end)
                if self._aloft:
                    self._all_landed = trio.Event()
                    await self._all_landed.wait()
        finally:
            if self._end is not None:
                self._end.close()
                os.close(self._fd)
                self._fd = -1  # and no other file that gets the number
                # A read that was given up may return when all is over: its reply must not go to whatever gets the number.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._reply_fd, inheritable=False)
                os.close(nowhere)
            self._notices.put(None)

    # ---- what is taken from /dev/fuse

    def is_ready(self) -> bool:
        """Whether a request waits there."""
        return bool(self._ready.poll(0))

    def _attach(self, fd: int) -> None:
        """Take *fd* over from pyfuse3, which has just mounted it."""
        self._fd = os.dup(fd)
        self._reply_fd = os.dup(fd)
        os.set_blocking(self._fd, False)
        self._ready.register(self._fd, select.POLLIN)
        self._end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self._end, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            with contextlib.suppress(OSError):  # whatever net.core.wmem_max says, if we may
                end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BYTES)
        self._end.settimeout(0)
        os.dup2(other.fileno(), fd, inheritable=False)
        other.close()
        # Now, and not when it is needed: which is when descriptors run out.
        threading.Thread(target=_notify_all, args=(os.dup(self._fd), self._notices), daemon=True).start()
        assert self._nursery is not None
        self._nursery.start_soon(self._take)
        self._nursery.start_soon(self._pass_on_all)

    def _stop(self) -> None:
        """Nothing is taken any more."""
        if not self._over:
            self._over = True
            if self._end is not None:
                trio.lowlevel.notify_closing(self._fd)
            for task in self._takers:
                trio.lowlevel.reschedule(task)
            self._takers.clear()

    async def _take(self) -> None:
        """Our task: takes all requests, and answers at once what can be."""
        while not self._over:
            try:
                length = await self._receive()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.EFAULT, errno.ENOMEM}:
                    continue  # it was given up before we had it; for want of memory the kernel has answered EIO
                if error.errno != errno.ENODEV:
                    raise
                self._stop()  # unmounted
                return
            self._answer(length)

    def _answer(self, length: int) -> None:
        """Answer the request in the buffers, or begin what will."""
        _, opcode, unique, node, _, _, _, _, handle, offset, size, _, _, _, _ = _REQUEST.unpack_from(self._header)
        if opcode == _READ:
            data = self._read_at_once(handle, offset, size)
            if data is None:
                self._begin_read(unique, handle, offset, size)
            else:
                self._tell(unique, data)
        elif opcode == _WRITE:
            self._begin_write(unique, handle, offset, self._data(size))
        elif opcode == _FORGET:
            self._forget([(node, handle)])
        elif opcode == _BATCH_FORGET:
            message = self._message(length)
            (count,) = _COUNT.unpack_from(message, _HEADER_BYTES)
            at = _HEADER_BYTES + 8
            self._forget([*_FORGOTTEN.iter_unpack(message[at : at + count * _FORGOTTEN.size])])
        elif opcode == _GETXATTR and self._header[_NAME_AT:length] == _CAPABILITY:
            if not self._tell_capability(unique, node):
                self._forward(length)
        elif opcode != _INTERRUPT:  # which changes nothing: pyfuse3 has no way to tell anybody
            self._forward(length)

    def _forward(self, length: int) -> None:
        """Have pyfuse3 answer the request in the buffers."""
        self._forwarded.append(self._message(length))
        if self._takers:
            trio.lowlevel.reschedule(self._takers.pop())

    async def _receive(self) -> int:
        """Have one request in the buffers. Without a round of the loop where one waits already, IN_A_ROW times."""
        self.in_a_row += 1
        if self.in_a_row < IN_A_ROW:
            try:
                return os.readv(self._fd, self._buffers)
            except BlockingIOError:
                pass
        self.in_a_row = 0
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            if self._over:  # while this task was being woken
                raise trio.ClosedResourceError
            with contextlib.suppress(BlockingIOError):
                return os.readv(self._fd, self._buffers)

    def _data(self, size: int) -> bytes:
        """What is to be written by the request in the buffers."""
        large = self._large
        if size == len(large):
            self._expect(size)
            return large
        if size < len(large):
            data = large[:size]
        elif large:
            data = b"".join((large, self._rest[: size - len(large)]))
        else:
            data = bytes(self._rest[:size])
        if size > LARGE_BYTES:
            self._expect(size)
        return data

    def _expect(self, size: int) -> None:
        self._large = cast("bytes", _new_bytes(None, size))
        place = _memory(_address(self._large), size, _WRITABLE)  # nobody else has seen it yet
        self._buffers = [self._header, place, self._rest]

    def _message(self, length: int) -> bytes:
        """The whole request."""
        parts, left = [], length
        for part in (self._header, self._large, self._rest):
            parts.append(memoryview(part)[: max(left, 0)])
            left -= len(part)
        return b"".join(parts)

    # ---- how it is answered

    def _read_at_once(self, handle: int, offset: int, size: int) -> bytes | None:
        try:
            data: bytes | None = self._operations.read_at_once(handle, offset, size)
        except Exception:
            log.exception("a bug in reading from the page cache; the mount stays")
            return None
        return data

    def _begin_read(self, unique: int, handle: int, offset: int, size: int) -> None:
        reply = self._reply_fd, _ANSWER.pack(_ANSWER.size + size, 0, unique)
        begin = functools.partial(self._operations.begin_read, handle, offset, size, reply)
        self._begin(begin, self._tell_read, unique)

    def _begin_write(self, unique: int, handle: int, offset: int, data: bytes) -> None:
        begin = functools.partial(self._operations.begin_write, handle, offset, data)
        self._begin(begin, self._tell_written, unique)

    def _begin(
        self,
        begin: Callable[[Callable[[Any], None], Callable[[_More], None]], None],
        tell: Callable[[int, Any], None],
        unique: int,
    ) -> None:
        """Until *begin* has called one of the two, no task waits for the request."""

        def answer(result: Any) -> None:
            tell(unique, result)
            self._has_landed()  # not before: whoever fails at telling goes on

        def go_on(more: _More) -> None:
            assert self._nursery is not None
            self._nursery.start_soon(self._finish, more, tell, unique)
            self._has_landed()

        self._aloft += 1
        begin(answer, go_on)

    async def _finish(self, more: _More, tell: Callable[[int, Any], None], unique: int) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()  # no attempt goes out after the end of the server
        try:
            tell(unique, await more())
        except pyfuse3.FUSEError as error:
            self._send(_ANSWER.pack(_ANSWER.size, -error.errno, unique))
        except Exception:  # a bug costs one request, not the mount (P11)
            log.exception("a bug in answering a request, which gets EIO; the mount stays")
            self._send(_ANSWER.pack(_ANSWER.size, -errno.EIO, unique))

    def _has_landed(self) -> None:
        self._aloft -= 1
        if not self._aloft and self._all_landed is not None:
            self._all_landed.set()

    def _tell_capability(self, unique: int, node: int) -> bool:
        """Whether it is known: the kernel asks for it before every write that goes through its page cache."""
        try:
            known: bytes | int | None = self._operations.known_capability(node)
        except Exception:
            log.exception("a bug in what is known of node %d; the mount stays", node)
            return False
        if known is None:
            return False
        (room,) = _COUNT.unpack_from(self._header, _HEADER_BYTES)
        if isinstance(known, int):
            self._send(_ANSWER.pack(_ANSWER.size, -known, unique))
        elif not room:  # how long it is
            self._tell(unique, _SIZE.pack(len(known), 0))
        elif len(known) > room:
            self._send(_ANSWER.pack(_ANSWER.size, -errno.ERANGE, unique))
        else:
            self._tell(unique, known)
        return True

    def _tell_read(self, unique: int, data: bytes | None) -> None:
        if data is not None:  # or else the kernel's thread has replied
            self._tell(unique, data)

    def _tell_written(self, unique: int, count: int) -> None:
        self._send(_WRITTEN.pack(_WRITTEN.size, 0, unique, count, 0))

    def _forget(self, nodes: Sequence[tuple[int, int]]) -> None:
        for node, lookups in nodes:
            try:
                self._operations.forgotten(node, lookups)
            except Exception:  # a bug costs one node, not the mount (P11)
                log.exception("a bug in forgetting node %d; the mount stays", node)

    def _tell(self, unique: int, data: bytes) -> None:
        try:
            os.writev(self._fd, (_ANSWER.pack(_ANSWER.size + len(data), 0, unique), data))
        except OSError as error:
            _not_told(error)

    def _send(self, answer: bytes | bytearray) -> None:
        try:
            os.write(self._fd, answer)
        except OSError as error:
            _not_told(error)

    # ---- what is pyfuse3's

    async def wait_for_forwarded(self, fd: int) -> None:
        """In place of trio.lowlevel.wait_readable, for pyfuse3, with /dev/fuse. Raises ClosedResourceError at the end."""
        if self._end is None:
            self._attach(fd)
        assert self._end is not None
        while not (self._forwarded or self._over):
            task = trio.lowlevel.current_task()
            self._takers.append(task)

            def abort(_raise_cancel: Callable[[], NoReturn], task: trio.lowlevel.Task = task) -> trio.lowlevel.Abort:
                self._takers.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if not self._forwarded:
            raise trio.ClosedResourceError
        self._end.sendall(self._forwarded.popleft())

    def terminated(self, _fd: int) -> None:
        """In place of trio.lowlevel.notify_closing, for pyfuse3."""
        self._stop()

    def pass_on(self) -> None:
        """To the kernel, what pyfuse3 has answered."""
        if self._end is None:
            return
        got = len(self._received)
        while got == len(self._received):
            try:
                got = self._end.recv_into(self._received)
            except BlockingIOError:
                break
            self._answers += self._received[:got]
        while len(self._answers) >= _ANSWER.size:
            length, _, _ = _ANSWER.unpack_from(self._answers)
            if not _ANSWER.size <= length <= len(self._answers):
                return
            self._send(self._answers[:length])
            del self._answers[:length]

    async def _pass_on_all(self) -> None:
        """What is not passed on at the `Gate`, to which no task comes any more once the session is over."""
        assert self._end is not None
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                await trio.lowlevel.wait_readable(self._end)
                self.pass_on()

    # ---- what the kernel has not asked for

    def forget_name(self, parent: int, name: bytes) -> None:
        """Have the kernel forget *name* in the directory *parent*, and in time the node.

        Not by pyfuse3, whose thread would write between the pieces of an answer. In a thread: the kernel waits for the directory's
        lock, and who has that may wait for us.
        """
        body = _NAME.pack(parent, len(name), 0) + name + b"\0"
        self._notices.put(_ANSWER.pack(_ANSWER.size + len(body), _INVAL_ENTRY, 0) + body)


class Gate:
    """In place of trio.Lock, for pyfuse3: each of its tasks comes here as soon as it has answered."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        self._device.pass_on()
        await self._lock.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._lock.release()


def _notify_all(fd: int, notices: queue.SimpleQueue[bytes | None]) -> None:
    while (notice := notices.get()) is not None:
        with contextlib.suppress(OSError):  # ENOENT: it is forgotten already
            os.write(fd, notice)
    os.close(fd)


def _not_told(error: OSError) -> None:
    if error.errno not in {errno.ENOENT, errno.ENODEV}:  # nobody waits for it any more
        log.error(
            "the kernel has refused an answer (%s): whoever waits for it does so until the mount is unmounted", error
        )


def others_wait() -> bool:
    """Whether the request that was taken last had been waiting for its turn: there are more than one at a time."""
    return _device.in_a_row > 0


def forget_name(parent: int, name: bytes) -> None:
    """Have the kernel forget *name* in the directory *parent*. Does not wait."""
    _device.forget_name(parent, name)


def request_waits() -> bool:
    """Whether there is a request to be taken from /dev/fuse."""
    return _device.is_ready()


_device = Device()


class _Lowlevel:
    """trio.lowlevel, but for two functions."""

    def __init__(self, device: Device) -> None:
        self.wait_readable = device.wait_for_forwarded
        self.notify_closing = device.terminated

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    """trio, but for two names."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.lowlevel = _Lowlevel(device)

    def Lock(self) -> Gate:  # noqa: N802 - trio's name
        return Gate(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


async def main(operations: object) -> None:
    """Serve the mount of `pyfuse3.init` until it is unmounted, or pyfuse3.terminate() is called."""
    gc.freeze()  # what is there by now stays
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    pyfuse3.trio = _Trio(_device)  # type: ignore[attr-defined]
    await _device.serve(operations)
