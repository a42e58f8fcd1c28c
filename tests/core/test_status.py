"""`systemctl status` in words."""

from __future__ import annotations

import errno

import pytest

from iohang_fuse.events import Op
from iohang_fuse.rehandle import HeldBytes, Policy, RehandleList
from iohang_fuse.status import hang_words


def clock(at_s: float) -> str:
    return f"00:00:{at_s:02.0f}"


@pytest.fixture
def policy() -> Policy:
    return Policy(
        timeout_s=dict.fromkeys(Op, 10.0),
        interval_s=5,
        errors=frozenset({errno.EIO, errno.ESTALE}),
        timeout_errno=errno.EIO,
        recovery_gate=4,
        blocked_after_s=5,
    )


def image(name: str, policy: Policy, number: int = errno.EIO, *, at_s: float = 1, count: int = 1) -> RehandleList:
    found = RehandleList(name, policy, HeldBytes(1 << 30))
    for each in range(count):
        request, _ = found.arrive(Op.READ, each, 1, at_s)
        found.failed(request, number, at_s)
    return found


def test_well(policy: Policy) -> None:
    """Nothing to say of images that are well."""
    assert hang_words([RehandleList("a.img", policy, HeldBytes(1))], clock) is None
    assert hang_words([], clock) is None


def test_hangs(policy: Policy) -> None:
    """Issue 5: "STATUS with the hang in words": how many, since when, which, why, how many requests."""
    one = image("vm1.qcow2", policy, at_s=7)
    assert hang_words([one], clock) == "1 image hangs, since 00:00:07: vm1.qcow2 (EIO), 1 request held"
    two = image("vm2.qcow2", policy, errno.ESTALE, at_s=3, count=2)
    assert hang_words([one, two], clock) == (
        "2 images hang, oldest since 00:00:03: vm2.qcow2 (ESTALE), vm1.qcow2 (EIO), 3 requests held"
    )


def test_many_are_counted_and_not_named(policy: Policy) -> None:
    """One line, however many hang; the oldest are named."""
    many = [image(f"vm{number}", policy, at_s=number) for number in range(9, 0, -1)]
    assert hang_words(many, clock) == (
        "9 images hang, oldest since 00:00:01: vm1 (EIO), vm2 (EIO), vm3 (EIO), 6 more, 9 requests held"
    )


def test_timed_out(policy: Policy) -> None:
    """A timed-out image is sick although nothing of it is held."""
    one = image("vm1", policy, at_s=1)
    one.tick(100)
    assert hang_words([one], clock) == "1 image timed out: vm1 (EIO), 0 requests held"
    two = image("vm2", policy, at_s=3)
    assert (
        hang_words([one, two], clock)
        == "1 image hangs, since 00:00:03, 1 image timed out: vm2 (EIO), vm1 (EIO), 1 request held"
    )


def test_no_answer(policy: Policy) -> None:
    """An attempt that has not returned has no errno."""
    one = RehandleList("vm1", policy, HeldBytes(1 << 30))
    one.arrive(Op.WRITE, 0, 1, 1)
    one.tick(20)
    assert hang_words([one], clock) == "1 image hangs, since 00:00:20: vm1 (no answer), 1 request held"
