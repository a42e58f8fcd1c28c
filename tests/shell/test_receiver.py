"""What is taken from /dev/fuse, by whom and in which round, and what is left to pyfuse3. A socket is in the kernel's place."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest
import trio

from iohang_fuse.receiver import IN_A_ROW, LARGE_BYTES, Device, Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


MIB = 1 << 20
FORGET, GETATTR, READ, WRITE, RELEASE, GETXATTR, INTERRUPT, BATCH_FORGET = 2, 3, 15, 16, 18, 22, 36, 42


class Rounds(trio.abc.Instrument):
    """Counts those of trio's loop."""

    count = 0

    def before_io_wait(self, _timeout: float) -> None:
        self.count += 1


class Operations:
    """The file system: of a read, *handle* says what becomes of the request of that number, which is its file handle."""

    def __init__(self, handle: Callable[[int], Awaitable[None]] | None) -> None:
        self.handle = handle
        self.rounds = Rounds()
        self.did: list[tuple[str, int, int]] = []  # ("take" or "answer", which request, in which round)
        self.written: list[tuple[int, int, bytes]] = []
        self.forgets: list[tuple[int, int]] = []
        self.bugs: set[int] = set()  # nodes
        self.error = 0
        self.capability: bytes | int | None = None
        # Of what no task waits for, by the read's number or the write's offset: answer, go_on, and the reply or the data.
        self.begun: dict[int, tuple[Any, Any, tuple[int, bytes]]] | None = None

    def note(self, what: str, request: int) -> None:
        self.did.append((what, request, self.rounds.count))

    def read_at_once(self, request: int, _offset: int, size: int) -> bytes | None:
        if self.handle is not None or self.begun is not None:
            return None
        self.note("take", request)
        self.note("answer", request)
        return b"x" * size

    def begin_read(
        self, request: int, _offset: int, size: int, reply: tuple[int, bytes], answer: Callable[[Any], Any], go_on: Any
    ) -> None:
        if self.begun is not None:
            self.begun[request] = answer, go_on, reply
            return

        async def read() -> bytes:
            assert self.handle is not None
            self.note("take", request)
            await self.handle(request)
            self.note("answer", request)
            return b"x" * size

        go_on(read)

    def begin_write(self, handle: int, offset: int, data: bytes, answer: Callable[[Any], Any], go_on: Any) -> None:
        if self.begun is not None:
            self.begun[offset] = answer, go_on, (-1, data)
            return

        async def write() -> int:
            if self.error:
                raise pyfuse3.FUSEError(self.error)
            self.written.append((handle, offset, data))
            return len(data)

        go_on(write)

    def known_capability(self, node: int) -> bytes | int | None:
        if node in self.bugs:
            raise ZeroDivisionError
        return self.capability if node == 1 else None

    def forgotten(self, node: int, lookups: int) -> None:
        if node in self.bugs:
            raise ZeroDivisionError
        self.forgets.append((node, lookups))


class Kernel:
    """The other end of /dev/fuse, the device, and the file system that it serves."""

    def __init__(self, handle: Callable[[int], Awaitable[None]] | None) -> None:
        self.end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.end, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
        self.end.settimeout(0)
        self.fuse = other.detach()
        self.operations = Operations(handle)
        self.device = Device()
        self.answers: dict[int, tuple[int, bytes]] = {}  # by the request's number: the error and what came with it
        self.for_pyfuse3: list[bytes] = []
        self.slow = trio.Event()  # one of pyfuse3's requests that does not return
        self.slow.set()
        self.reply: Callable[[bytes], bytes] = lambda message: answer(unique_of(message))

    def ask(self, *requests: int, size: int = 1) -> None:
        """Reads."""
        for request in requests:
            self.send(READ, request, struct.pack("=QQIIQII", request, 0, size, 0, 0, 0, 0))

    def write(self, unique: int, offset: int, data: bytes) -> None:
        self.send(WRITE, unique, struct.pack("=QQIIQII", 7, offset, len(data), 0, 0, 0, 0) + data)

    def send(self, opcode: int, unique: int, body: bytes, node: int = 1) -> bytes:
        message = struct.pack("=IIQQIIII", 40 + len(body), opcode, unique, node, 0, 0, 0, 0) + body
        self.end.send(message)
        return message

    def hear(self) -> None:
        """All answers that there are."""
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self.end.recv(2 * MIB)
                if not message:  # the server has gone
                    return
                length, error, unique = struct.unpack_from("=IiQ", message)
                assert length == len(message)
                assert unique not in self.answers
                self.answers[unique] = error, message[16:]

    async def answered(self, *requests: int) -> None:
        """Until *requests* are."""
        with trio.fail_after(20):
            while not self.answers.keys() >= {*requests}:
                self.hear()
                await trio.sleep(0.001)

    async def pyfuse3_main(self, *_: int) -> None:
        """pyfuse3's loop, as far as it matters here: see _session_loop in its internal.pxi."""
        gate = Gate(self.device)

        async def session_loop() -> None:
            while True:
                try:
                    async with gate:
                        await self.device.wait_for_forwarded(self.fuse)
                except trio.ClosedResourceError:
                    return
                message = os.read(self.fuse, 2 * MIB)
                self.for_pyfuse3.append(message)
                reply = self.reply(message)
                if reply:
                    os.write(self.fuse, reply)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(session_loop)
        await self.slow.wait()

    def in_rounds(self, what: str) -> list[int]:
        """How many requests were taken, or answered, in each round in which any was."""
        rounds = [number for did, _, number in self.operations.did if did == what]
        return [rounds.count(number) for number in sorted({*rounds})]


def unique_of(message: bytes) -> int:
    return int(struct.unpack_from("=IIQ", message)[2])


def answer(unique: int, body: bytes = b"", error: int = 0) -> bytes:
    return struct.pack("=IiQ", 16 + len(body), error, unique) + body


@contextlib.asynccontextmanager
async def mounted(
    monkeypatch: pytest.MonkeyPatch, handle: Callable[[int], Awaitable[None]] | None = None
) -> AsyncIterator[Kernel]:
    kernel = Kernel(handle)
    monkeypatch.setattr(pyfuse3, "main", kernel.pyfuse3_main)
    trio.lowlevel.add_instrument(kernel.operations.rounds)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.device.serve, kernel.operations)
            await trio.testing.wait_all_tasks_blocked()
            yield kernel
            kernel.device.terminated(kernel.fuse)
    finally:
        trio.lowlevel.remove_instrument(kernel.operations.rounds)
        kernel.end.close()
        os.close(kernel.fuse)


async def test_who_has_answered_at_once_goes_on_in_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of it: a round of the loop for each request costs more than the request."""
    async with mounted(monkeypatch) as kernel:
        kernel.ask(*range(IN_A_ROW - 1))
        await kernel.answered(*range(IN_A_ROW - 1))
        did = kernel.operations.did
        assert [request for what, request, _ in did if what == "take"] == [*range(IN_A_ROW - 1)]
        assert kernel.in_rounds("take") == [IN_A_ROW - 1]


async def test_others_have_their_turn_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: answers, timers and signals do not wait for a busy guest."""
    async with mounted(monkeypatch) as kernel:
        kernel.ask(*range(200))
        await kernel.answered(*range(200))
        assert max(kernel.in_rounds("take")) <= IN_A_ROW


async def test_what_needs_a_task_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a round costs is shared by all that it takes, though each sleeps until its request is done."""
    ready = trio.Event()

    async def later(_request: int) -> None:
        await ready.wait()

    async with mounted(monkeypatch, later) as kernel:
        kernel.ask(*range(100))
        with trio.fail_after(20):
            while len(kernel.operations.did) < 100:
                await trio.lowlevel.checkpoint()
        assert len(kernel.in_rounds("take")) <= 100 // (IN_A_ROW - 1) + 2
        ready.set()
        await kernel.answered(*range(100))


async def test_one_that_is_slow_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: whoever waits for its request does so outside. P8: and it has its answer before the server's end."""
    ready = trio.Event()

    async def slow(request: int) -> None:
        if request == 0:
            await ready.wait()

    async with mounted(monkeypatch, slow) as kernel:
        kernel.ask(0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for number in range(1, 100):
            kernel.ask(number)
            await kernel.answered(number)
        kernel.device.terminated(kernel.fuse)
        await trio.testing.wait_all_tasks_blocked(0.01)
        ready.set()
        with trio.fail_after(20):
            while 0 not in kernel.answers:
                await trio.lowlevel.checkpoint()
                kernel.hear()


async def test_written_data_is_what_was_sent_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: what is received where it stays must never be received over again, whatever the sizes are that come after it."""
    chance = random.Random(4)
    sizes = [
        4096,
        MIB,
        MIB,
        MIB,
        512,
        LARGE_BYTES,
        LARGE_BYTES + 1,
        LARGE_BYTES + 1,
        MIB,
        4096,
        4096,
        MIB,
        700_000,
        700_000,
        1,
    ]
    sizes += [chance.choice((1, 512, 4096, LARGE_BYTES + 512, 300_000, MIB)) for _ in range(100)]
    sent = []
    async with mounted(monkeypatch) as kernel:
        for unique, size in enumerate(sizes, 1):
            data = chance.randbytes(size)
            sent.append((7, unique * MIB, data))
            kernel.write(unique, unique * MIB, data)
            await kernel.answered(unique)
            assert kernel.answers[unique] == (0, struct.pack("=II", size, 0))
    assert kernel.operations.written == sent


async def test_an_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mounted(monkeypatch) as kernel:
        kernel.operations.error = errno.ENOSPC
        kernel.write(1, 0, b"data")
        await kernel.answered(1)
        assert kernel.answers == {1: (-errno.ENOSPC, b"")}


async def test_a_bug_in_what_is_answered_at_once_costs_no_more_than_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: the request goes the long way."""

    async def well(_request: int) -> None:
        pass

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    async with mounted(monkeypatch, well) as kernel:
        monkeypatch.setattr(kernel.operations, "read_at_once", bug)
        kernel.ask(1)
        await kernel.answered(1)
    assert "ZeroDivisionError" in caplog.text


async def test_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, and as many as fit into a message; there is no answer."""
    many = [(number, number % 3 + 1) for number in range(1, 5000)]
    async with mounted(monkeypatch) as kernel:
        kernel.send(FORGET, 0, struct.pack("=Q", 3), node=9)
        await trio.testing.wait_all_tasks_blocked(0.01)
        kernel.send(
            BATCH_FORGET, 0, struct.pack("=II", len(many), 0) + b"".join(struct.pack("=QQ", *one) for one in many)
        )
        await trio.testing.wait_all_tasks_blocked(0.01)
        kernel.hear()
    assert kernel.operations.forgets == [(9, 3), *many]
    assert kernel.answers == {}


async def test_what_is_forgotten_is_so_before_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next finds it done: rmdir(2) on NFS, for example, for which all descriptors must have been closed."""
    seen = []
    async with mounted(monkeypatch) as kernel:
        kernel.reply = lambda message: seen.append(len(kernel.operations.forgets)) or answer(unique_of(message))
        for number in range(1, 21):  # trio has no order for tasks of one turn
            kernel.send(FORGET, 0, struct.pack("=Q", 1), node=number)
            kernel.send(RELEASE, number, bytes(24))
            await kernel.answered(number)
    assert seen == [*range(1, 21)]


async def test_a_bug_in_forgetting_costs_one_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: the rest of the message is not lost, and nobody the mount."""
    async with mounted(monkeypatch) as kernel:
        kernel.operations.bugs = {6}
        kernel.send(BATCH_FORGET, 0, struct.pack("=II", 3, 0) + struct.pack("=6Q", 5, 1, 6, 2, 7, 3))
        kernel.ask(1)
        await kernel.answered(1)
    assert kernel.operations.forgets == [(5, 1), (7, 3)]
    assert "a bug in forgetting node 6" in caplog.text


async def test_all_others_are_pyfuse3s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message whole and alone, whatever was received before it; its answers go the other way, in any pieces."""
    chance = random.Random(5)
    uniques = itertools.count(1)
    sent, wanted = [], {}
    async with mounted(monkeypatch) as kernel:
        kernel.reply = lambda message: answer(unique_of(message), message[40:], -errno.ENOENT)
        for size in (0, 8, 16, 40, 41, 300, 65_700, 0, 65_700):
            kernel.write(next(uniques), 0, bytes(chance.choice((512, MIB))))
            together = [(next(uniques), chance.randbytes(size)) for _ in range(3)]
            for unique, body in together:
                sent.append(kernel.send(GETATTR, unique, body))
                wanted[unique] = -errno.ENOENT, body
            kernel.send(INTERRUPT, next(uniques), struct.pack("=Q", together[0][0]))  # is for nobody
            await kernel.answered(*wanted)
        assert {unique: kernel.answers[unique] for unique in wanted} == wanted
    assert sorted(kernel.for_pyfuse3) == sorted(sent)


async def begun(kernel: Kernel, *keys: int) -> None:
    """Until *keys* are."""
    with trio.fail_after(20):
        while not (kernel.operations.begun or {}).keys() >= {*keys}:  # noqa: ASYNC110 - it is the device's doing
            await trio.sleep(0.001)


async def test_what_no_task_waits_for_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, each with its own; and not a second time where the reply has been made."""
    async with mounted(monkeypatch) as kernel:
        kernel.operations.begun = table = {}
        kernel.ask(1, 2, 3, size=4)
        kernel.write(4, 400, b"data")
        await begun(kernel, 1, 2, 3, 400)
        for request in (1, 2, 3):
            fd, head = table[request][2]
            assert head == struct.pack("=IiQ", 16 + 4, 0, request)
            assert fd == kernel.device._reply_fd
        table[400][0](4)
        table[3][0](b"yyyy")
        table[2][0](None)
        table[1][0](b"xx")
        await kernel.answered(1, 3, 4)
        assert kernel.answers == {1: (0, b"xx"), 3: (0, b"yyyy"), 4: (0, struct.pack("=II", 4, 0))}


async def test_what_is_left_to_do_is_done_by_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first attempt has failed, for example. What comes of it is answered, errors included."""
    async with mounted(monkeypatch) as kernel:
        kernel.operations.begun = table = {}

        async def done(what: object) -> object:
            await trio.sleep(0.01)
            if isinstance(what, int) and what < 0:
                raise pyfuse3.FUSEError(-what)
            return what

        kernel.ask(1, 2, size=4)
        kernel.write(3, 300, b"data")
        kernel.write(4, 400, b"data")
        await begun(kernel, 1, 2, 300, 400)
        for key, what in {1: b"xxxx", 2: -errno.EIO, 300: 4, 400: -errno.ESTALE}.items():
            table[key][1](functools.partial(done, what))
        await kernel.answered(1, 2, 3, 4)
        assert kernel.answers == {
            1: (0, b"xxxx"), 2: (-errno.EIO, b""), 3: (0, struct.pack("=II", 4, 0)), 4: (-errno.ESTALE, b""),
        }  # fmt: skip


async def test_the_end_waits_for_what_no_task_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: what was taken is answered."""
    async with mounted(monkeypatch) as kernel:
        kernel.operations.begun = table = {}
        kernel.ask(1, 2, size=4)
        await begun(kernel, 1, 2)
        kernel.device.terminated(kernel.fuse)
        await trio.sleep(0.05)
        table[1][0](b"xxxx")
        await trio.sleep(0.05)

        async def done() -> bytes:
            await trio.sleep(0.05)
            return b"yyyy"

        table[2][1](done)
        await kernel.answered(1, 2)
        assert kernel.answers == {1: (0, b"xxxx"), 2: (0, b"yyyy")}


async def test_a_bug_in_answering_does_not_keep_the_end_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8, P11: what a request without a task was to be answered with is no bytes; who asked is told, and the server ends."""

    async def eio() -> bytes:
        raise pyfuse3.FUSEError(errno.EIO)

    async with mounted(monkeypatch) as kernel:
        kernel.operations.begun = table = {}
        kernel.ask(1, 2, size=4)
        await begun(kernel, 1, 2)
        answer, go_on, _ = table[1]
        with pytest.raises(TypeError):
            answer(7)
        go_on(eio)
        await kernel.answered(1)
        kernel.device.terminated(kernel.fuse)
        await trio.sleep(0.05)
        table[2][0](b"xxxx")
        await kernel.answered(2)
        assert kernel.answers == {1: (-errno.EIO, b""), 2: (0, b"xxxx")}


async def test_a_bug_in_a_task_costs_one_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: neither what comes of it nor telling that ends the mount, and nobody waits for ever (P8)."""

    async def bug() -> bytes:
        raise ZeroDivisionError

    async def no_bytes() -> int:
        return 7

    async with mounted(monkeypatch) as kernel:
        kernel.operations.begun = table = {}
        kernel.ask(1, 2, 3, size=4)
        await begun(kernel, 1, 2, 3)
        table[1][1](bug)
        table[2][1](no_bytes)
        await kernel.answered(1, 2)
        table[3][0](b"xxxx")
        await kernel.answered(3)
        assert kernel.answers == {1: (-errno.EIO, b""), 2: (-errno.EIO, b""), 3: (0, b"xxxx")}
    assert caplog.text.count("a bug in answering a request") == 2


async def test_nothing_begins_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """P5: what a task is to do, and has not begun when all is cancelled, is not done: nobody would hear of it."""
    did = []

    async def late() -> bytes:
        did.append("late")
        return b"xxxx"

    with trio.CancelScope() as scope:
        async with mounted(monkeypatch) as kernel:
            kernel.operations.begun = table = {}
            kernel.ask(1, size=4)
            await begun(kernel, 1)
            table[1][1](late)
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert did == []


async def test_a_capability_that_is_known_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel asks before every write by its page cache. Everything else about it is pyfuse3's."""

    def ask(unique: int, size: int, name: bytes = b"security.capability", node: int = 1) -> bytes:
        return kernel.send(GETXATTR, unique, struct.pack("=II", size, 0) + name + b"\0", node)

    async with mounted(monkeypatch) as kernel:
        kernel.operations.capability = errno.ENODATA
        ask(1, 0)
        ask(2, 100)
        await kernel.answered(1, 2)
        kernel.operations.capability = b"all of them"
        ask(3, 0)
        ask(4, 11)
        ask(5, 10)
        await kernel.answered(3, 4, 5)
        none = (-errno.ENODATA, b"")
        told = [none, none, (0, struct.pack("=II", 11, 0)), (0, b"all of them"), (-errno.ERANGE, b"")]
        assert [kernel.answers[unique] for unique in range(1, 6)] == told
        assert kernel.for_pyfuse3 == []

        others = [
            ask(6, 100, b"security.capabilit"),
            ask(7, 100, b"security.capability.of_a_name_that_is_longer_than_the_header"),
            ask(8, 100, node=2),
        ]
        kernel.operations.capability = None
        others.append(ask(9, 100))
        kernel.operations.bugs = {3}
        others.append(ask(10, 100, node=3))
        await kernel.answered(6, 7, 8, 9, 10)
        assert kernel.for_pyfuse3 == others


async def test_a_name_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """FUSE_NOTIFY_INVAL_ENTRY of linux/fuse.h."""
    async with mounted(monkeypatch) as kernel:
        kernel.device.forget_name(7, b"name")
        await kernel.answered(0)
        assert kernel.answers == {0: (3, struct.pack("=QII", 7, 4, 0) + b"name\0")}


async def test_an_answer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between pyfuse3 and us is a stream."""
    async with mounted(monkeypatch) as kernel:
        whole = answer(1, b"first") + answer(2, b"second")
        for at in range(0, len(whole), 7):
            os.write(kernel.fuse, whole[at : at + 7])
            await trio.testing.wait_all_tasks_blocked(0.001)
        await kernel.answered(1, 2)
        assert kernel.answers == {1: (0, b"first"), 2: (0, b"second")}


async def test_what_pyfuse3_answers_after_the_end_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: while another of its requests does not return. It looks for the end of its session before it comes back to the gate."""
    async with mounted(monkeypatch) as kernel:
        kernel.slow = trio.Event()
        kernel.device.terminated(kernel.fuse)
        await trio.testing.wait_all_tasks_blocked(0.01)
        os.write(kernel.fuse, answer(1))
        await kernel.answered(1)
        kernel.slow.set()


class Failing:
    """os.readv that fails once, or more often, where there is a request."""

    def __init__(self, *errors: int) -> None:
        self.errors = [*errors]
        self._receive = os.readv

    def __call__(self, fd: int, buffers: Any) -> int:
        if self.errors and select.select([fd], [], [], 0)[0]:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return self._receive(fd, buffers)


async def test_a_request_that_cannot_be_had_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sent it was killed, or there was no memory: the kernel has answered it then."""
    async with mounted(monkeypatch) as kernel:
        monkeypatch.setattr(os, "readv", Failing(errno.ENOENT, errno.EFAULT, errno.ENOMEM))
        kernel.ask(1)
        await kernel.answered(1)


async def test_what_nobody_expects_is_no_end_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit is started again only after a failure."""
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="Invalid argument"), flatten_subgroups=True):
        async with mounted(monkeypatch) as kernel:
            monkeypatch.setattr(os, "readv", Failing(errno.EINVAL))
            kernel.ask(1)
            await trio.sleep(10)


async def test_what_was_taken_before_the_end_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last close, which makes an image stable, and then the unmounting, in one round."""
    async with mounted(monkeypatch) as kernel:
        monkeypatch.setattr(os, "readv", receive_one_and(errno.ENODEV))
        kernel.send(RELEASE, 1, bytes(24))
        await kernel.answered(1)
    assert [unique_of(message) for message in kernel.for_pyfuse3] == [1]


def receive_one_and(number: int) -> Callable[[int, Any], int]:
    """os.readv that fails with *number* after one request."""
    receive, received = os.readv, list[int]()

    def receiving(fd: int, buffers: Any) -> int:
        if received:
            raise OSError(number, os.strerror(number))
        received.append(receive(fd, buffers))
        return received[0]

    return receiving


async def test_after_the_end_a_reply_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that hangs may return when another file would have the number; nor may /dev/fuse stay open for it.

    P8: the end of its last descriptor is what ends those who wait.
    """
    async with mounted(monkeypatch) as kernel:
        reply_fd = kernel.device._reply_fd
        assert os.readlink(f"/proc/self/fd/{reply_fd}").startswith("socket:")
    assert os.readlink(f"/proc/self/fd/{reply_fd}") == "/dev/null"
    os.close(reply_fd)


async def test_unmounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/fuse says ENODEV then. Nothing is left, and nobody waits."""
    kernel = Kernel(None)
    monkeypatch.setattr(pyfuse3, "main", kernel.pyfuse3_main)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel.device.serve, kernel.operations)
            await trio.testing.wait_all_tasks_blocked()
            monkeypatch.setattr(os, "readv", Failing(errno.ENODEV))
            kernel.ask(1)
    assert kernel.operations.did == []
    kernel.end.close()
    os.close(kernel.fuse)
