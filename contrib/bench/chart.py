"""The picture: for each SOURCE grouped bars by workload, small blocks in thousands of operations a second, large in GiB/s.

The axis ends a little above the fastest *mount* where SOURCE itself is far beyond that: it may be ten times as fast, and would
leave nothing to be seen of the others. A bar that goes beyond the axis has an arrow. Each bar has its figure; whiskers are the
least and the most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from contrib.bench.figures import Results, number, two_lines
from contrib.bench.plan import CEILING, CONTENDERS, DIRECT_SOURCE, OURS, PEER, SOURCE, Workload

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart; hatches tell what is near in grey.
_STYLES: Mapping[str, tuple[str, str]] = {
    SOURCE: ("#999999", ""),
    DIRECT_SOURCE: ("#DDDDDD", "..."),
    "passthrough_ll": ("#56B4E9", ""),
    "bindfs": ("#0072B2", ""),
    PEER: ("#009E73", "///"),
    CEILING: ("#FFFFFF", "xxx"),
    OURS[0]: ("#D55E00", ""),
    OURS[1]: ("#E69F00", "\\\\\\"),
    OURS[2]: ("#CC79A7", ""),
}
_FAR = 2.5
"""How many times the fastest mount's rate SOURCE's own may be and still be drawn as a whole."""
_GROUP = 0.86
"""Of the space between two workloads, what their bars take."""


def draw(results: Mapping[str, Results], file: Path, note: str) -> None:
    """Write the picture of *results*, by the titles of their SOURCEs, to *file*; its suffix says which format."""
    mpl.use("agg")  # no screen is needed
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "iohang-fuse", "font.size": 9, "hatch.linewidth": 0.5})
    height = 3.4 * len(results) + 1
    figure = plt.figure(figsize=(14, height))
    rows = figure.add_gridspec(len(results), 1)
    names: dict[str, None] = {}
    for row, (title, one) in enumerate(results.items()):
        names |= dict.fromkeys(one.contenders)
        parts = _panels(one)
        cells = rows[row].subgridspec(1, len(parts), width_ratios=[len(part) for part in parts])
        for column, workloads in enumerate(parts):
            axis = figure.add_subplot(cells[column])
            _panel(axis, one, workloads)
            if not column:
                axis.set_title(f"SOURCE: {title}", loc="left", fontweight="bold")
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=_STYLES[name][0], hatch=_STYLES[name][1], edgecolor="black", linewidth=0.6)
        for name in CONTENDERS
        if name in names
    ]
    labels = [CONTENDERS[name] for name in CONTENDERS if name in names]
    figure.legend(handles, labels, loc="upper center", ncols=min(len(labels), 4), frameon=False)
    figure.text(
        0.99, 0.002, f"medians; whiskers: least and most; {note}", ha="right", va="bottom", fontsize=8, color="#444444"
    )
    figure.tight_layout(rect=(0, 0.01, 1, 1 - 0.6 / height))
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def _panels(results: Results) -> list[list[Workload]]:
    """The workloads that share an axis: those of one unit."""
    small = [workload for workload in results.workloads if not workload.in_gib]
    large = [workload for workload in results.workloads if workload.in_gib]
    return [workloads for workloads in (small, large) if workloads]


def _panel(axis: Axes, results: Results, workloads: list[Workload]) -> None:
    names = results.contenders
    mounts = [name for name in names if name not in (SOURCE, DIRECT_SOURCE)] or names
    rates = {
        name: max((found.most for workload in workloads if (found := results.rate(name, workload))), default=0)
        for name in names
    }
    fastest_mount = max((rates[name] for name in mounts), default=0) or 1
    top = 1.25 * max(rate for rate in (*rates.values(), fastest_mount) if rate <= _FAR * fastest_mount)
    width = _GROUP / len(names)
    for index, name in enumerate(names):
        color, hatch = _STYLES[name]
        for group, workload in enumerate(workloads):
            x = group + (index - (len(names) - 1) / 2) * width
            found = results.rate(name, workload)
            if found is None:
                axis.text(x, 0.01 * top, " fails", rotation=90, ha="center", va="bottom", fontsize=7, color="#444444")
                continue
            axis.bar(
                x, min(found.median, top), width * 0.92, color=color, hatch=hatch, edgecolor="black", linewidth=0.6
            )
            if found.most <= top:
                whisker = [[found.median - found.least], [found.most - found.median]]
                axis.errorbar(x, found.median, yerr=whisker, color="black", linewidth=0.8, capsize=1.5)
            beyond = found.most > top
            axis.annotate(
                number(found.median) + (" \N{RIGHTWARDS ARROW}" if found.median > top else ""),
                (x, min(found.median, top) if beyond else found.most),
                xytext=(0, -4 if beyond else 3),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="top" if beyond else "bottom",
                fontsize=7,
            )
    axis.set_ylim(0, top)
    axis.set_xlim(-0.5, len(workloads) - 0.5)
    axis.set_xticks(range(len(workloads)), ["\n".join(two_lines(workload.title)) for workload in workloads])
    axis.tick_params(axis="x", length=0)
    axis.set_ylabel("GiB/s" if workloads[0].in_gib else "thousand operations/s")
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
