"""The command line of contrib/benchmark. Nothing is measured here, and nothing that measures is imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from contrib.bench.plan import CONTENDERS, NETWORK_WORKLOADS, SOURCES, WORKLOADS, workloads_of

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_SVG = Path("build/benchmark.svg")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and no usage."""
        self.exit(2, f"benchmark: {message}\n")


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Ends the process with one line and exit code 2 where something makes no sense."""
    parser = _Parser(
        prog="contrib/benchmark", description="How fast the mount is, against everything that one could mount."
    )
    names = dict.fromkeys(one.name for one in (*WORKLOADS, *NETWORK_WORKLOADS))
    parser.add_argument(
        "--source", nargs="+", choices=SOURCES, default=[*SOURCES], metavar="SOURCE", help=", ".join(SOURCES)
    )
    parser.add_argument(
        "--contender", nargs="+", choices=CONTENDERS, default=[*CONTENDERS], metavar="NAME", help=", ".join(CONTENDERS)
    )
    parser.add_argument("--workload", nargs="*", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (5)")
    parser.add_argument("--seconds", type=float, default=2, help="how long each run of fio measures (2)")
    parser.add_argument("--guest", action="store_true", help="and what dd makes of it inside a guest of QEMU's")
    parser.add_argument("--svg", type=Path, default=DEFAULT_SVG, metavar="FILE", help=f"the picture ({DEFAULT_SVG})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw results (beside the picture)")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    if not 0.1 <= arguments.seconds <= 600:
        parser.error("--seconds: from 0.1 to 600")
    arguments.json = arguments.json or arguments.svg.with_suffix(".json")
    if arguments.json == arguments.svg:
        parser.error("--json and --svg: one file cannot be both")
    arguments.source = [name for name in SOURCES if name in arguments.source]
    arguments.contender = [name for name in CONTENDERS if name in arguments.contender]
    if arguments.workload:
        for name in arguments.source:
            if not any(one.name in arguments.workload for one in workloads_of(name)):
                parser.error(
                    f"--source {name}: has none of these workloads, but {', '.join(w.name for w in workloads_of(name))}"
                )
    return arguments
