"""From measurements to medians, ratios, verdicts and tables. Pure: no clock, no file, no process.

A ratio is taken between two contenders within one round, minutes apart at most, and the median of these ratios is what
counts: whatever else the machine did in that round slowed both.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contrib.bench.plan import (
    CEILING,
    CONTENDERS,
    DIRECT_SOURCE,
    GIB,
    KIB,
    LATENCY,
    OURS,
    PEER,
    SOURCE,
    Measurement,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

WIDTH = 132
_NAME, _CELL = 28, 14

BOUNDS: Mapping[str, tuple[float, float]] = {
    "4k-read-1": (1.3, 0.6),
    "4k-read-16": (1.1, 0.65),
    "4k-write-16": (0.9, 0.45),
    "1m-read-4": (2.0, 0.7),
    "1m-write-4": (1.5, 0.5),
}
"""The least that a workload's rate may be of nbdfuse + retry-request's, and of pyfuse3's with empty handlers, on ext4."""

LATENCY_BOUND_US = 90.0
"""How much longer than SOURCE's own a 4k read at depth 1 may take, in the median."""


def network_bound(workload: Workload) -> float:
    """The least of SOURCE's own rate that must come through, where SOURCE takes 0.5 ms."""
    return 0.95 if workload.block_bytes >= 16 * KIB else 0.9


@dataclass(frozen=True)
class Spread:
    """What some rounds came to."""

    median: float
    least: float
    most: float


def spread(values: Iterable[float]) -> Spread | None:
    """None if there are none."""
    known = sorted(values)
    return Spread(statistics.median(known), known[0], known[-1]) if known else None


class Results:
    """All measurements of one SOURCE."""

    def __init__(self, measurements: Iterable[Measurement], workloads: Sequence[Workload]) -> None:
        self.workloads = workloads
        self._cells: dict[tuple[str, str], list[Measurement]] = {}
        for measurement in measurements:
            self._cells.setdefault((measurement.contender, measurement.workload), []).append(measurement)

    @property
    def contenders(self) -> list[str]:
        """Those that were measured, in the order of the tables."""
        return [name for name in CONTENDERS if any(contender == name for contender, _ in self._cells)]

    def error(self, contender: str, workload: Workload) -> str:
        """Why it failed, in any round; a contender that fails at times has no figure."""
        return next((one.error for one in self._cells.get((contender, workload.name), []) if one.error), "")

    def rounds(self, contender: str, workload: Workload) -> dict[int, Measurement]:
        """By round; none if any failed."""
        if self.error(contender, workload):
            return {}
        return {one.round: one for one in self._cells.get((contender, workload.name), [])}

    def rate(self, contender: str, workload: Workload) -> Spread | None:
        """In the workload's unit."""
        return spread(one.rate(in_gib=workload.in_gib) for one in self.rounds(contender, workload).values())

    def ratio(self, contender: str, other: str, workload: Workload) -> Spread | None:
        """*contender*'s rate to *other*'s, round by round."""
        return self._paired(
            contender, other, workload, lambda ours, theirs: _rate(ours, workload) / _rate(theirs, workload)
        )

    def added_latency_us(self, contender: str, workload: Workload) -> Spread | None:
        """How much longer than SOURCE's own, by the medians of each round."""
        return self._paired(
            contender, SOURCE, workload, lambda ours, theirs: ours.latency_p50_us - theirs.latency_p50_us
        )

    def _paired(
        self, contender: str, other: str, workload: Workload, combine: Callable[[Measurement, Measurement], float]
    ) -> Spread | None:
        ours, theirs = self.rounds(contender, workload), self.rounds(other, workload)
        return spread(combine(ours[number], theirs[number]) for number in ours.keys() & theirs.keys())


def _rate(measurement: Measurement, workload: Workload) -> float:
    return measurement.rate(in_gib=workload.in_gib)


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rate_tables(results: Results) -> list[str]:
    """Medians, and beneath each the least and the most."""
    return _grid(results, [*results.contenders], lambda name, workload: _rate_cell(results, name, workload), unit=True)


def _rate_cell(results: Results, name: str, workload: Workload) -> tuple[str, str]:
    if error := results.error(name, workload):
        return f"fails {error}", ""
    found = results.rate(name, workload)
    if found is None:
        return "-", ""
    alone = len(results.rounds(name, workload)) == 1
    return number(found.median), "" if alone else f"{number(found.least)}-{number(found.most)}"


def cost_tables(results: Results) -> list[str]:
    """The servers' CPU time."""
    names = [name for name in results.contenders if name not in (SOURCE, DIRECT_SOURCE)]

    def per(unit: Callable[[Measurement], float]) -> Callable[[str, Workload], tuple[str, str]]:
        def cell(name: str, workload: Workload) -> tuple[str, str]:
            rounds = results.rounds(name, workload).values()
            found = spread(one.cpu_s / unit(one) for one in rounds if unit(one))
            return (number(found.median) if found else "-"), ""

        return cell

    return [
        "CPU of the server, seconds per GiB",
        *_grid(results, names, per(lambda one: one.bytes / GIB), unit=False),
        "",
        "CPU of the server, milliseconds per 1,000 operations",
        *_grid(results, names, per(lambda one: one.operations / 1e6), unit=False),
    ]


def _grid(
    results: Results, names: list[str], cell: Callable[[str, Workload], tuple[str, str]], *, unit: bool
) -> list[str]:
    """A row for each contender, a column for each workload, as many as there is room for side by side."""
    lines: list[str] = []
    columns = (WIDTH - _NAME) // _CELL
    for start in range(0, len(results.workloads), columns):
        part = results.workloads[start : start + columns]
        titles = [two_lines(workload.title) for workload in part]
        lines += [f"{'':{_NAME}}" + "".join(f"{title[line]:>{_CELL}}" for title in titles) for line in (0, 1)]
        if unit:
            lines.append(f"{'':{_NAME}}" + "".join(f"{workload.unit:>{_CELL}}" for workload in part))
        for name in names:
            cells = [cell(name, workload) for workload in part]
            lines.append(f"{CONTENDERS[name]:{_NAME}}" + "".join(f"{upper:>{_CELL}}" for upper, _ in cells))
            if any(lower for _, lower in cells):
                lines.append(f"{'':{_NAME}}" + "".join(f"{lower:>{_CELL}}" for _, lower in cells))
        lines.append("")
    return [line.rstrip() for line in lines[:-1]]


def two_lines(title: str) -> tuple[str, str]:
    """A workload's title where there is little room."""
    words = title.split()
    return " ".join(words[:2]), " ".join(words[2:])


def verdict(found: Spread | None, bound: float | None, *, at_most: bool = False) -> str:
    """`met`, `NOT met`, `not measured`, or nothing where no bound is set."""
    if bound is None:
        return ""
    if found is None:
        return "not measured"
    return "met" if (found.median <= bound if at_most else found.median >= bound) else "NOT met"


def _judged(found: Spread | None, bound: float | None, *, unit: str = "", at_most: bool = False) -> str:
    """A figure, its spread, the bound and the verdict, in 44 columns."""
    figure = f"{found.median:.2f} ({found.least:.2f}-{found.most:.2f})" if found and not unit else "-"
    if found and unit:
        figure = f"{found.median:.0f} ({found.least:.0f}-{found.most:.0f}) {unit}"
    words = f"{'<=' if at_most else '>='} {bound:g}{unit and ' ' + unit}" if bound is not None else ""
    return f"{figure:>20}  {words:>10}  {verdict(found, bound, at_most=at_most):<12}"


def ratio_table(results: Results, *, bounded: bool) -> list[str]:
    """Against the peer and against the ceiling; *bounded* where the bounds hold (SOURCE on ext4)."""
    lines = [f"{'':44}{'to ' + CONTENDERS[PEER]:^44}{'to ' + CONTENDERS[CEILING]:^44}".rstrip()]
    for name in (name for name in results.contenders if name in OURS):
        for workload in results.workloads:
            peer, ceiling = BOUNDS.get(workload.name, (None, None)) if bounded else (None, None)
            judged = [
                _judged(results.ratio(name, other, workload), bound)
                for other, bound in ((PEER, peer), (CEILING, ceiling))
            ]
            lines.append(f"{CONTENDERS[name]:22}{workload.title:22}{''.join(judged)}".rstrip())
    return lines


def network_table(results: Results) -> list[str]:
    """What comes through of SOURCE's own rate."""
    lines = [f"{'':44}{'to ' + CONTENDERS[SOURCE]:^44}".rstrip()]
    for name in (name for name in results.contenders if name in OURS):
        for workload in results.workloads:
            if workload.depth >= 16 and not workload.guest:
                judged = _judged(results.ratio(name, SOURCE, workload), network_bound(workload))
                lines.append(f"{CONTENDERS[name]:22}{workload.title:22}{judged}".rstrip())
    return lines


def latency_table(results: Results) -> list[str]:
    """At depth 1: the median and the 99th percentile, by fio, and what is above SOURCE's own."""
    workload = next((workload for workload in results.workloads if workload.name == LATENCY), None)
    if workload is None:
        return []
    lines = [f"{'latency, ' + workload.title:{_NAME}}{'median us':>14}{'p99 us':>14}{'median above SOURCE':>26}"]
    for name in results.contenders:
        rounds = results.rounds(name, workload).values()
        p50, p99 = spread(one.latency_p50_us for one in rounds), spread(one.latency_p99_us for one in rounds)
        figures = [f"{number(figure.median) if figure else '-':>14}" for figure in (p50, p99)]
        added = None if name in (SOURCE, DIRECT_SOURCE) else results.added_latency_us(name, workload)
        bound = LATENCY_BOUND_US if name in OURS else None
        words = "" if name in (SOURCE, DIRECT_SOURCE) else _judged(added, bound, unit="us", at_most=True)
        lines.append(f"{CONTENDERS[name]:{_NAME}}{''.join(figures)}{words:>50}".rstrip())
    return lines


def report(title: str, results: Results, *, bounded: bool, network: bool) -> str:
    """All tables of one SOURCE."""
    parts = [[f"SOURCE: {title}", "=" * (8 + len(title))], rate_tables(results)]
    parts.append(network_table(results) if network else ratio_table(results, bounded=bounded))
    parts += [latency_table(results), cost_tables(results)]
    return "\n\n".join("\n".join(part) for part in parts if part)
