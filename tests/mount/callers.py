"""Work as another user. FUSE asks who calls, so it takes a process: effective ids of a thread would not do."""

from __future__ import annotations

import errno
import os
import pickle
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(frozen=True)
class User:
    """Who a piece of work is done as. Numbers that no system gives to anybody by itself."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    umask: int = 0o022


TEAM = 4100
ROOT = User(0, 0)
ALICE = User(4001, 4001)
BOB = User(4002, 4002)
ALICE_OF_TEAM = User(4001, 4001, (TEAM,))
BOB_OF_TEAM = User(4002, 4002, (TEAM,))


def as_user(user: User, work: Callable[[], T]) -> T:
    """What *work* returns or raises, done in a child process that has become *user*."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be(user, work, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"the child ended with status {status} and no answer"
    succeeded, value = pickle.loads(answer)  # noqa: S301 - from our own child
    if succeeded:
        result: T = value
        return result
    raise value


def _be(user: User, work: Callable[[], T], writer: int) -> None:
    try:
        os.setgroups(user.groups)
        os.setgid(user.gid)
        os.setuid(user.uid)
        os.umask(user.umask)
        answer = pickle.dumps((True, work()))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent raises it
        try:
            answer = pickle.dumps((False, error))
        except Exception:  # noqa: BLE001 - not every exception can be pickled
            answer = pickle.dumps((False, AssertionError(traceback.format_exc())))
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(answer)
    os._exit(0)


def outcome(work: Callable[[], T]) -> T | str:
    """What *work* returns, or the name of its errno."""
    try:
        return work()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
