"""What `iohangctl doctor` and `iohang-mount --check` have found, and how they say it.

Pure: judgements in, lines and an exit code out.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = 3
"""Exit code where nothing could be judged: wrong usage, or no such mount."""

WIDTH = 100
"""Unless told: of lines of prose. A command stands on one line, however long, so that it can be copied."""


class Level(enum.IntEnum):
    """How bad it is, the worst last."""

    OK = 0
    ADVICE = 1
    """Nothing is wrong; this is worth knowing, or doing."""
    WARNING = 2
    """It serves, and in an outage it will not do what it is there for."""
    PROBLEM = 3
    """It does not serve, or guests will be harmed."""

    def __str__(self) -> str:
        return self.name.lower()


EXIT_CODES = {Level.OK: 0, Level.ADVICE: 0, Level.WARNING: 1, Level.PROBLEM: 2}
"""In line with `iohangctl check`: a monitoring plug-in's OK, WARNING, CRITICAL."""


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what is seen, what that means, and what to do (a command or an option)."""

    level: Level
    about: str
    seen: str
    means: str = ""
    do: str = ""


def worst(findings: Sequence[Finding]) -> Level:
    """The level of the worst of them."""
    return max((finding.level for finding in findings), default=Level.OK)


def exit_code(findings: Sequence[Finding]) -> int:
    """0: nothing worse than advice; 1: warnings; 2: problems."""
    return EXIT_CODES[worst(findings)]


def lines(findings: Sequence[Finding], width: int = WIDTH) -> list[str]:
    """For people: the worst last, next to the prompt, and a count."""
    said = []
    for finding in sorted(findings, key=lambda each: each.level):
        head = f"{finding.level!s:<8}{finding.about}: "
        text = finding.seen + (f". {_sentence(finding.means)}" if finding.means else "")
        said += textwrap.wrap(
            head + text, width, subsequent_indent=" " * 8, break_on_hyphens=False, break_long_words=False
        )
        if finding.do:
            said.append(f"        -> {finding.do}")
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    said.append(
        f"{_counted(counts[Level.PROBLEM], 'problem')}, {_counted(counts[Level.WARNING], 'warning')}, "
        f"{counts[Level.ADVICE]} of advice, {counts[Level.OK]} ok"
    )
    return said


def report(source: str, mountpoint: str, found: Sequence[Finding], *, json_: bool, width: int = WIDTH) -> str:
    """All of it, for people or for programs."""
    if not json_:
        return "\n".join([f"{source} at {mountpoint}", *lines(found, width)]) + "\n"
    said = {
        "source": source,
        "mountpoint": mountpoint,
        "worst": str(worst(found)),
        "findings": [{**dataclasses.asdict(each), "level": str(each.level)} for each in found],
    }
    return json.dumps(said, indent=2) + "\n"


def _sentence(clause: str) -> str:
    return clause[:1].upper() + clause[1:]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
