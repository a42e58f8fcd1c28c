"""The language of the trigger file: what a line means, and what is said of one that means nothing."""

from __future__ import annotations

import errno
import math
import random
from typing import TYPE_CHECKING

import pytest

from iohang_fuse.flaky import BadRule, Call, Rule, Trigger, parse

if TYPE_CHECKING:
    from pathlib import Path

DATA = frozenset({"read", "write", "fsync"})


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("data *.img errno=EIO", Rule(DATA, "*.img", errno=errno.EIO)),
        (
            "write,fsync vm1.img errno=ETIMEDOUT delay=2",
            Rule(frozenset({"write", "fsync"}), "vm1.img", errno=errno.ETIMEDOUT, delay_s=2),
        ),
        (
            "read vm1.img errno=EIO bytes=4096-8191",
            Rule(frozenset({"read"}), "vm1.img", errno=errno.EIO, bytes_from=4096, bytes_to=8191),
        ),
        ("data,open vm1.img hang", Rule(DATA | {"open"}, "vm1.img", hang=True)),
        ("write * short=512", Rule(frozenset({"write"}), "*", short=512)),
        ("read\t*   delay=0.05   # a slow network", Rule(frozenset({"read"}), "*", delay_s=0.05)),
        ("writeback * errno=EIO bytes=0-511", Rule(frozenset({"writeback"}), "*", errno=errno.EIO, bytes_to=511)),
        ("data,flush x stale", Rule(DATA | {"flush"}, "x", stale=True)),
        ("read x errno=EIO chance=0.25", Rule(frozenset({"read"}), "x", errno=errno.EIO, chance=0.25)),
        ("read x errno=EIO chance=0", Rule(frozenset({"read"}), "x", errno=errno.EIO, chance=0)),
        ("read x errno=EIO chance=1", Rule(frozenset({"read"}), "x", errno=errno.EIO)),
    ],
)
def test_a_line(line: str, rule: Rule) -> None:
    assert parse(line) == [rule]


def test_lines_keep_their_order_and_comments_and_blanks_are_none() -> None:
    rules = parse("# an outage\n\nread a errno=EIO\n   # nothing\nread b errno=EIO # yes\n")
    assert [rule.files for rule in rules] == ["a", "b"]


def test_a_star_is_every_operation() -> None:
    (rule,) = parse("* x hang")
    for operation in ("read", "lookup", "getattr", "readdir", "statfs", "release", "rename", "access", "writeback"):
        assert operation in rule.operations


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("read", "'read' is not `OPERATIONS FILES WHAT...`"),
        ("read x", "'read x' is not"),
        ("reed x errno=EIO", "no operation reed; there are: access, create,"),
        ("read,writ x errno=EIO", "no operation writ;"),
        ("read x errno=EOI", "'errno=EOI' is none of errno=NAME, hang,"),
        ("read x errno=5", "'errno=5' is none of"),
        ("read x errno", "'errno' is none of"),
        ("read x hang=1", "'hang=1' is none of"),
        ("read x delay", "delay"),
        ("read x delay=soon", "delay=soon"),
        ("read x delay=-1", "delay=-1"),
        ("read x delay=nan", "delay=nan"),
        ("read x delay=inf", "delay=inf"),
        ("read x short=-1", "short=-1"),
        ("read x short=some", "short=some"),
        ("read x bytes=7", "bytes=7"),
        ("read x bytes=9-7", "bytes=9-7"),
        ("read x bytes=a-b", "bytes=a-b"),
        ("lookup x short=1", "'short=1' is for read and write"),
        ("writeback x short=1", "'short=1' is for read and write"),
        ("read x chance=1.5", "'chance=1.5' is none of"),
        ("read x chance=-1", "chance=0...1"),
        ("read x chance=50%", "chance=0...1"),
        ("read x chance", "chance=0...1"),
        ("read x stale=1", "'stale=1' is none of"),
        (
            "read,open,lookup x stale",
            "'stale' is for read, write, fsync and flush, which are by handle, and not for lookup, open",
        ),
        ("writeback x stale", "and not for writeback"),
        ("* x stale", "and not for *"),
        ("fsync x bytes=0-1", "'bytes=0-1' is for read, write and writeback"),
    ],
)
def test_what_means_nothing_is_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(BadRule) as refused:
        parse(f"read first errno=EIO\n{text}\n")
    assert str(refused.value).startswith("line 2: ")
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("files", "path", "fits"),
    [
        ("*.img", "vm1.img", True),
        ("*.img", "folder/vm1.img", True),
        ("vm1.img", "folder/vm1.img", True),
        ("folder/*", "folder/vm1.img", True),
        ("folder/*", "other/vm1.img", False),
        ("vm?.img", "vm1.img", True),
        ("vm[12].img", "vm3.img", False),
        ("VM1.img", "vm1.img", False),
        ("*", ".", True),
    ],
)
def test_files_are_a_pattern_for_the_path_or_its_last_part(files: str, path: str, fits: bool) -> None:  # noqa: FBT001
    (rule,) = parse(f"read {files} errno=EIO")
    assert rule.fits("read", path, 0, 1) is fits


@pytest.mark.parametrize(
    ("offset", "length", "fits"),
    [
        (0, 4096, False),
        (0, 4097, True),
        (4095, 1, False),
        (4095, 2, True),
        (4096, 1, True),
        (8191, 1, True),
        (8192, 1, False),
        (0, 10**9, True),
        (4096, 0, True),
    ],
)
def test_bytes_are_the_first_and_the_last(offset: int, length: int, fits: bool) -> None:  # noqa: FBT001
    (rule,) = parse("read x errno=EIO bytes=4096-8191")
    assert rule.fits("read", "x", offset, length) is fits


def test_with_bytes_the_rule_is_about_reads_and_writes() -> None:
    (rule,) = parse("data x errno=EIO bytes=0-511")
    assert rule.fits("write", "x", 0, 512)
    assert not rule.fits("fsync", "x", 0, 0)


def test_a_writeback_meets_a_rule_where_one_of_its_ranges_does() -> None:
    (rule,) = parse("writeback x errno=EIO bytes=4096-8191")
    dice = random.Random(0)
    assert Call("writeback", "x", [(0, 512), (4608, 512)]).meets(rule, dice)
    assert not Call("writeback", "x", [(0, 4096), (8192, 512)]).meets(rule, dice)


def test_without_bytes_the_whole_file_is_meant() -> None:
    (rule,) = parse("read x errno=EIO")
    assert (rule.bytes_from, rule.bytes_to) == (0, math.inf)
    assert rule.fits("read", "x", 1 << 60, 1)
    assert not rule.fits("write", "x", 0, 1)


# ---- the trigger file


@pytest.fixture
def trigger(tmp_path: Path) -> tuple[Trigger, Path]:
    return Trigger(str(tmp_path / "trigger")), tmp_path / "trigger"


def put(file: Path, text: str) -> None:
    """Replace the file as mv(1) does."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_no_file_no_fault(trigger: tuple[Trigger, Path]) -> None:
    assert trigger[0].rule(Call("read", "x")) is None


def test_the_first_rule_that_fits_counts(trigger: tuple[Trigger, Path]) -> None:
    put(trigger[1], "read a errno=EIO\nread * errno=ESTALE\nread b errno=ENOSPC\n")
    numbers = [rule.errno for name in "ab" if (rule := trigger[0].rule(Call("read", name)))]
    assert numbers == [errno.EIO, errno.ESTALE]
    assert trigger[0].rule(Call("write", "a")) is None


def test_a_change_is_seen_at_once(trigger: tuple[Trigger, Path]) -> None:
    for number in (errno.EIO, errno.ESTALE, errno.EIO):
        put(trigger[1], f"read * errno={errno.errorcode[number]}\n")
        rule = trigger[0].rule(Call("read", "x"))
        assert rule is not None
        assert rule.errno == number
    trigger[1].unlink()
    assert trigger[0].rule(Call("read", "x")) is None
    put(trigger[1], "")
    assert trigger[0].rule(Call("read", "x")) is None


def test_a_file_that_means_nothing_leaves_the_rules_as_they_were(
    trigger: tuple[Trigger, Path], caplog: pytest.LogCaptureFixture
) -> None:
    put(trigger[1], "read * errno=EIO\n")
    assert trigger[0].rule(Call("read", "x")) is not None
    for text in ("read * errno=NONSENSE\n", "read *\n"):
        put(trigger[1], text)
        assert trigger[0].rule(Call("read", "x")) is not None
    trigger[1].with_suffix(".new").write_bytes(b"read \xff errno=EIO\n")
    trigger[1].with_suffix(".new").replace(trigger[1])
    assert trigger[0].rule(Call("read", "x")) is not None
    assert len([r for r in caplog.records if "the rules before it stay in force" in r.getMessage()]) == 3


# ---- chance


def hits(trigger: Trigger, calls: int) -> list[bool]:
    return [trigger.rule(Call("read", "x")) is not None for _ in range(calls)]


def test_a_chance_is_how_often_a_rule_applies(trigger: tuple[Trigger, Path]) -> None:
    for chance, low, high in (("0", 0, 0), ("0.2", 140, 260), ("1", 1000, 1000)):
        put(trigger[1], f"read * errno=EIO chance={chance}\n")
        assert low <= sum(hits(Trigger(str(trigger[1]), seed=1), 1000)) <= high


def test_the_same_seed_is_the_same_luck(trigger: tuple[Trigger, Path]) -> None:
    put(trigger[1], "read * errno=EIO chance=0.5\n")
    first, again, other = (hits(Trigger(str(trigger[1]), seed), 64) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_rule_whose_chance_has_not_come_leaves_the_call_to_the_next(trigger: tuple[Trigger, Path]) -> None:
    put(trigger[1], "read * errno=EIO chance=0.5\nread * errno=ENOSPC\n")
    seeded = Trigger(str(trigger[1]), seed=1)
    numbers = {rule.errno for _ in range(64) if (rule := seeded.rule(Call("read", "x")))}
    assert numbers == {errno.EIO, errno.ENOSPC}


def test_the_dice_are_thrown_once_a_call(trigger: tuple[Trigger, Path]) -> None:
    """A call that hangs asks for its rule again and again: it must not get away by luck."""
    put(trigger[1], "read * hang chance=0.5\n")
    seeded = Trigger(str(trigger[1]), seed=1)
    for _ in range(16):
        call = Call("read", "x")
        assert len({seeded.rule(call) for _ in range(16)}) == 1


def test_only_calls_that_fit_throw_dice(trigger: tuple[Trigger, Path]) -> None:
    put(trigger[1], "read x errno=EIO chance=0.5\n")
    alone, among_others = (Trigger(str(trigger[1]), seed=3) for _ in range(2))
    expected = hits(alone, 32)
    seen = []
    for _ in range(32):
        assert among_others.rule(Call("write", "x")) is None
        seen += hits(among_others, 1)
    assert seen == expected
