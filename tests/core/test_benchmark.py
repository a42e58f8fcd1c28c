"""contrib/benchmark without a mount: what is asked of fio, what is read from its JSON, and the arithmetic of the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from contrib.bench.arguments import parse_arguments
from contrib.bench.figures import BOUNDS, Results, Spread, number, report, spread, verdict
from contrib.bench.plan import (
    CEILING,
    CONTENDERS,
    GIB,
    NETWORK_WORKLOADS,
    OURS,
    PEER,
    SOURCE,
    WORKLOADS,
    Measurement,
    parse_fio,
)
from contrib.guest.records import Stream, parse_record

if TYPE_CHECKING:
    from collections.abc import Sequence

WORKLOAD = {workload.name: workload for workload in (*WORKLOADS, *NETWORK_WORKLOADS)}
READ = WORKLOAD["4k-read-16"]
LARGE = WORKLOAD["1m-read-4"]
URING = OURS[0]


def direction(total_ios: int = 0, **more: Any) -> dict[str, Any]:
    percentiles = {"percentile": {"50.000000": 30_000, "99.000000": 90_500}} if total_ios else {}
    empty = {"total_ios": total_ios, "io_bytes": total_ios * 4096, "iops": 0.0, "bw_bytes": 0, "runtime": 0}
    return empty | {"lat_ns": percentiles} | more


def fio_report(error: int = 0, **directions: dict[str, Any]) -> str:
    job = {"error": error, "read": direction(), "write": direction()} | directions
    return "fio: a note before the JSON\n" + json.dumps({"jobs": [job]})


def measured(contender: str, rates: Sequence[float], workload: str = READ.name, **more: Any) -> list[Measurement]:
    """One round for each of *rates*, in operations a second."""
    return [
        Measurement("ext4", workload, contender, number_, operations_per_s=rate, **more)
        for number_, rate in enumerate(rates)
    ]


def test_figures_are_from_fio() -> None:
    figures = parse_fio(fio_report(read=direction(8000, iops=4000.0, bw_bytes=16_384_000, runtime=2000)))
    assert figures == {
        "operations": 8000,
        "bytes": 8000 * 4096,
        "duration_s": 2.0,
        "operations_per_s": 4000.0,
        "bytes_per_s": 16_384_000.0,
        "latency_p50_us": 30.0,
        "latency_p99_us": 90.5,
    }


def test_of_a_mixture_both_directions_count() -> None:
    slow = {"lat_ns": {"percentile": {"50.000000": 1, "99.000000": 1}}}
    figures = parse_fio(
        fio_report(read=direction(700, iops=70.0, bw_bytes=7), write=direction(300, iops=30.0, bw_bytes=3, **slow))
    )
    assert (figures["operations"], figures["operations_per_s"], figures["bytes_per_s"]) == (1000, 100, 10)
    assert figures["latency_p50_us"] == 30, "of the direction that has more operations"


def test_a_job_that_failed_has_an_errno_and_no_figure() -> None:
    assert parse_fio(fio_report(error=22, write=direction(5, iops=5.0))) == {"error": "EINVAL"}
    assert parse_fio(fio_report()) == {"error": "nothing done"}


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(ValueError, match="no such option"):
        parse_fio("fio: no such option\n")


@pytest.mark.parametrize("seconds", [0.5, 2])
def test_fio_measures_as_long_as_it_is_told(seconds: float) -> None:
    """Of `--runtime=0.5` fio drops what is below a second, and 0 is for ever."""
    assert f"--runtime={seconds * 1000:.0f}ms" in READ.fio(Path("file"), 4096, seconds, direct=True)


def test_only_the_page_cache_takes_o_direct_away() -> None:
    direct = {name: workload.fio(Path("file"), 4096, 1, direct=True) for name, workload in WORKLOAD.items()}
    assert [name for name, command in direct.items() if "--direct=1" not in command] == ["4k-fsync"]
    assert "--direct=0" in READ.fio(Path("file"), 4096, 1, direct=False)


def test_a_ratio_is_taken_within_a_round() -> None:
    """It is the median of the rounds' ratios, 0.5, 0.25 and 4; the ratio of the medians would be 20 / 20."""
    results = Results([*measured(URING, [10, 20, 60]), *measured(PEER, [20, 80, 15])], [READ])
    assert results.ratio(URING, PEER, READ) == Spread(0.5, 0.25, 4.0)


def test_a_round_that_only_one_of_them_has_does_not_count() -> None:
    results = Results([*measured(URING, [20, 1000]), *measured(PEER, [10])], [READ])
    assert results.ratio(URING, PEER, READ) == Spread(2.0, 2.0, 2.0)
    assert Results(measured(URING, [20]), [READ]).ratio(URING, PEER, READ) is None


def test_who_fails_once_has_no_figure() -> None:
    failed = Measurement("ext4", READ.name, PEER, 1, error="EINVAL")
    results = Results([*measured(URING, [20, 20]), *measured(PEER, [10]), failed], [READ])
    assert results.rate(PEER, READ) is None
    assert results.ratio(URING, PEER, READ) is None
    text = report("x", results, bounded=True, network=False)
    assert "fails EINVAL" in text
    assert "not measured" in text


def test_medians_and_units() -> None:
    assert spread([3, 1, 2, 10]) == Spread(2.5, 1, 10)
    assert spread([]) is None
    results = Results(
        [*measured(SOURCE, [4000]), *measured(SOURCE, [1], LARGE.name, bytes_per_s=3.0 * GIB)], [READ, LARGE]
    )
    assert results.rate(SOURCE, READ) == Spread(4, 4, 4), "thousands of operations a second"
    assert results.rate(SOURCE, LARGE) == Spread(3, 3, 3), "GiB a second"
    assert [number(value) for value in (0.456, 9.876, 12.34, 1234.5)] == ["0.46", "9.88", "12.3", "1,234"]


def test_latency_is_above_that_of_source_in_the_same_round() -> None:
    latency = WORKLOAD["4k-read-1"]
    rounds = [(SOURCE, 0, 10.0), (SOURCE, 1, 50.0), (URING, 0, 60.0), (URING, 1, 80.0)]
    results = Results(
        [Measurement("ext4", latency.name, name, turn, latency_p50_us=us) for name, turn, us in rounds], [latency]
    )
    assert results.added_latency_us(URING, latency) == Spread(40, 30, 50)


def test_verdicts() -> None:
    assert verdict(Spread(1.3, 0, 9), 1.3) == "met"
    assert verdict(Spread(1.29, 0, 9), 1.3) == "NOT met"
    assert verdict(Spread(91, 0, 99), 90, at_most=True) == "NOT met"
    assert verdict(Spread(90, 0, 99), 90, at_most=True) == "met"
    assert verdict(None, 1) == "not measured"
    assert verdict(Spread(1, 1, 1), None) == ""


def all_at(rate: float) -> list[Measurement]:
    return [
        Measurement("s", name, contender, turn, 10**6, GIB, 1, rate, rate * 4096, 10, 20, 1.5)
        for contender in CONTENDERS
        for name in WORKLOAD
        for turn in (0, 1)
    ]


@pytest.mark.parametrize("network", [False, True])
def test_the_tables_are_no_wider_than_132_columns(*, network: bool) -> None:
    workloads = NETWORK_WORKLOADS if network else WORKLOADS
    text = report("a source", Results(all_at(1_234_567), workloads), bounded=not network, network=network)
    assert max(map(len, text.splitlines())) <= 132
    for workload in workloads:
        assert workload.title.rpartition(" depth")[0] in text


def test_every_bound_stands_beside_its_figure() -> None:
    bounded = report("ext4", Results(all_at(1000), WORKLOADS), bounded=True, network=False)
    for name, bounds in BOUNDS.items():
        line = next(
            line
            for line in bounded.splitlines()
            if line.startswith(f"{CONTENDERS[URING]}") and WORKLOAD[name].title in line
        )
        assert [f">= {bound:g}" in line for bound in bounds] == [True, True], line
        assert line.count("met") == 2, line
    assert ">=" not in report("tmpfs", Results(all_at(1000), WORKLOADS), bounded=False, network=False)
    network = report("0.5 ms", Results(all_at(1000), NETWORK_WORKLOADS), bounded=False, network=True)
    counts = network.count(">= 0.95"), network.count(">= 0.9 ")
    assert counts == (8 * len(OURS), 4 * len(OURS)), "of ours each, at 16k and 64k, and at 4k"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--source", "floppy"], "floppy"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "many"], "many"),
        (["--seconds", "0"], "--seconds"),
        (["--workload", "4k-read-2"], "4k-read-2"),
        (["--source", "tmpfs", "--workload", "64k-read-32"], "none of these workloads"),
        (["--svg", "a", "--json", "a"], "--json and --svg"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_bad_argument_is_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(words)
    line = capsys.readouterr().err
    assert complaint in line
    assert line.count("\n") == 1


def test_without_arguments_all_is_measured() -> None:
    arguments = parse_arguments([])
    assert len(arguments.source) == 5
    assert {CEILING, PEER, SOURCE, *OURS} < {*arguments.contender}
    assert arguments.json == Path("build/benchmark.json")


def test_a_guest_says_how_long_its_dd_took() -> None:
    line = "DD op=write outcome=ok mib=128 begin=3.50 uptime=5.75"
    assert parse_record(line, 9.0) == Stream("write", "ok", 128 << 20, 2.25, 5.75, 9.0)
    failed = parse_record(line.replace("=ok", "=ERROR"), 9.0)
    assert isinstance(failed, Stream)
    assert failed.outcome == "ERROR"
    assert parse_record("DD op=write outcome=ok mib=", 9.0) is None
