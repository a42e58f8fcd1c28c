"""What Prometheus is told, made from what there is when it asks.

1. Nothing is kept for Prometheus: counts are tally.py's, and what is held is looked at when it asks. So a metric costs a request
   nothing.
2. `Metrics.collect` runs in a thread of its own (exposition.py), beside the event loop and without a lock. It takes copies of what
   the loop changes, each made in one step of the interpreter; two copies may be a moment apart.
3. `METRICS` has all that there is. docs/metrics.rst is its explanation.
"""

from __future__ import annotations

import dataclasses
import os
import time
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from iohang_fuse.events import Op
from iohang_fuse.messages import errno_name
from iohang_fuse.tally import BUCKETS_S, MOST_IMAGES, OTHERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from iohang_fuse.commands import About
    from iohang_fuse.images import Image
    from iohang_fuse.requests import Requests

Labels = tuple[str, ...]

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

METRICS: Mapping[str, tuple[str, Labels, str]] = {
    "iohang_held_requests": (GAUGE, ("image", "op"), "Requests that are held now."),
    "iohang_oldest_held_seconds": (GAUGE, ("image",), "How long the oldest held request is held; 0 if none is."),
    "iohang_hang_active": (GAUGE, ("image",), "1 while a request of the image is held."),
    "iohang_timed_out": (GAUGE, ("image",), "1 from a request that was given up until the storage answers: errors are passed on."),
    "iohang_reopen_refused": (GAUGE, ("image",), "1 while the image's descriptor is dead, and its name leads to no such file."),
    "iohang_hangs_total": (COUNTER, ("image",), "Hangs that have begun."),
    "iohang_timeouts_total": (COUNTER, ("image",), "How often the image became timed out."),
    "iohang_backend_errors_total": (COUNTER, ("image", "op", "errno"), "Attempts at the source that have failed."),
    "iohang_hang_duration_seconds": (HISTOGRAM, (), "How long hangs lasted that are over."),
    "iohang_held_bytes": (GAUGE, (), "Memory taken by data that is held, which held_limit bounds."),
    "iohang_held_limit_bytes": (GAUGE, (), "Option held_limit."),
    "iohang_write_log_bytes": (GAUGE, (), "Acknowledged data that is not known to be stable yet, in all write logs."),
    "iohang_write_logs_in_doubt": (GAUGE, (), "Open images whose write log has to be written again: a sync has failed."),
    "iohang_retries_total": (COUNTER, (), "Attempts beyond the first of a request."),
    "iohang_ended_total": (COUNTER, ("outcome",), "Requests that failed or were held, by how that ended."),
    "iohang_over_held_limit_total": (COUNTER, (), "Requests that were passed on because of held_limit."),
    "iohang_operations_total": (COUNTER, ("op",), "Requests that have arrived: reads, writes and syncs."),
    "iohang_io_bytes_total": (COUNTER, ("direction",), "Data of reads and writes that have succeeded: read, written."),
    "iohang_open_images": (GAUGE, (), "Images that are open."),
    "iohang_holding": (GAUGE, (), "1, or 0 while an operator has paused holding, for one image or all."),
    "iohang_serving": (GAUGE, (), "1 while the mount serves; 0 before it answers, and while it ends."),
    "iohang_loop_delay_seconds": (GAUGE, (), "For how long the server has not looked at the time: it is stuck."),
    "iohang_bugs_total": (COUNTER, (), "Requests that met a bug and were answered EIO; the log has the traceback."),
    "iohang_resident_memory_bytes": (GAUGE, (), "Memory of the server."),
    "iohang_cpu_seconds_total": (COUNTER, (), "Processor time of the server."),
    "iohang_start_time_seconds": (GAUGE, (), "When the server began, in seconds since the epoch."),
    "iohang_mount_info": (GAUGE, ("source", "mountpoint"), "Always 1: what is mounted where."),
    "iohang_build_info": (GAUGE, ("version", "engine"), "Always 1: the version of iohang-fuse, and how it does data I/O."),
}  # fmt: skip
"""By name: the kind, the labels, and the words."""

MOUNTPOINT = "mountpoint"

Values = dict[str, dict[Labels, float]]
"""By metric and by the values of its labels."""


@dataclasses.dataclass(slots=True)
class _Now:
    """What there is to say of the images of one label at this moment."""

    held: dict[Op, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(Op, 0))
    oldest_s: float = 0.0
    hanging: int = 0
    timed_out: int = 0
    refused: int = 0

    def add(self, image: Image, now: float) -> None:
        """One more image."""
        requests = [*image.held.held.values()]
        for request in requests:
            self.held[request.op] += 1
        self.oldest_s = max([self.oldest_s, *(now - request.limited_s for request in requests)])
        self.hanging += bool(requests)
        self.timed_out += image.held.timed_out
        self.refused += bool(image.refusal)


class Metrics(Collector):
    """All metrics of one mount, in a registry of their own."""

    def __init__(
        self,
        requests: Requests,
        about: About,
        *,
        now: Callable[[], float],
        bugs: Callable[[], int],
        serving: Callable[[], bool],
        name_the_mount: bool = False,
    ) -> None:
        """*now*: the event loop's clock. *name_the_mount*: each series says so, where those of several mounts meet."""
        self._requests = requests
        self._about = about
        self._now = now
        self._bugs = bugs
        self._serving = serving
        self._begun_s = time.time()
        self._constant = (_text(about.mountpoint),) if name_the_mount else ()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """The page, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing is looked at when it is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        values = self._values()
        for name, (kind, labels, words) in METRICS.items():
            if kind == HISTOGRAM:
                yield self._durations(name, words)
                continue
            constant = self._constant if MOUNTPOINT not in labels else ()
            family_of = COUNTER_OR_GAUGE[kind]
            family = family_of(name, words, labels=(*labels, *(MOUNTPOINT for _ in constant)))
            for given, value in values[name].items():
                family.add_metric((*map(_text, given), *constant), value)
            yield family

    def _durations(self, name: str, words: str) -> Metric:
        tally = self._requests.tally
        counts = accumulate([*tally.bucketed])
        bounds = [*(f"{bound:g}" for bound in BUCKETS_S), "+Inf"]
        family = HistogramMetricFamily(name, words, labels=[MOUNTPOINT for _ in self._constant])
        family.add_metric(self._constant, [*zip(bounds, counts, strict=True)], tally.hung_s)
        return family

    def _values(self) -> Values:
        images = [*self._requests.images.values()]
        return {**self._of_images(images), **self._of_the_mount(images), **self._of_the_server()}

    def _of_images(self, images: list[Image]) -> Values:
        """Images that are well and always were have no label, and so no series."""
        tally, now = self._requests.tally, self._now()
        counts = tally.images.copy()
        states = {name: _Now() for name in counts}
        for image in images:
            name = image.held.image
            if name not in states:
                if not image.held.sick:
                    continue
                # There was no room for it; or it became sick in this moment, or was renamed since its latest error.
                name = name if len(counts) < MOST_IMAGES else OTHERS
            states.setdefault(name, _Now()).add(image, now)
        if OTHERS in states or tally.others.latest:
            counts[OTHERS] = tally.others
            states.setdefault(OTHERS, _Now())
        return {
            "iohang_held_requests": {(n, str(op)): state.held[op] for n, state in states.items() for op in Op},
            "iohang_oldest_held_seconds": {(n,): state.oldest_s for n, state in states.items()},
            "iohang_hang_active": {(n,): state.hanging for n, state in states.items()},
            "iohang_timed_out": {(n,): state.timed_out for n, state in states.items()},
            "iohang_reopen_refused": {(n,): state.refused for n, state in states.items()},
            "iohang_hangs_total": {(n,): count.hangs for n, count in counts.items()},
            "iohang_timeouts_total": {(n,): count.timeouts for n, count in counts.items()},
            "iohang_backend_errors_total": {
                (name, str(op), errno_name(number) or ""): failures
                for name, count in counts.items()
                for (op, number), failures in count.errors.copy().items()
            },
        }

    def _of_the_mount(self, images: list[Image]) -> Values:
        requests, tally = self._requests, self._requests.tally
        holding = requests.holding and all(image.held.holding for image in images)
        return {
            "iohang_held_bytes": {(): requests.held_bytes},
            "iohang_held_limit_bytes": {(): requests.held_limit},
            "iohang_write_log_bytes": {(): sum(image.log.bytes for image in images)},
            "iohang_write_logs_in_doubt": {(): sum(image.log.in_doubt for image in images)},
            "iohang_retries_total": {(): tally.retries},
            "iohang_ended_total": {
                ("recovered",): tally.recovered,
                ("given_up",): tally.given_up,
                ("passed_on",): tally.passed_on,
            },
            "iohang_over_held_limit_total": {(): tally.over_limit},
            "iohang_operations_total": {("read",): tally.reads, ("write",): tally.writes, ("fsync",): tally.fsyncs},
            "iohang_io_bytes_total": {("read",): tally.bytes_read, ("written",): tally.bytes_written},
            "iohang_open_images": {(): len(images)},
            "iohang_holding": {(): holding},
            "iohang_mount_info": {(self._about.source, self._about.mountpoint): 1},
        }

    def _of_the_server(self) -> Values:
        return {
            "iohang_serving": {(): self._serving()},
            "iohang_loop_delay_seconds": {(): max(self._now() - self._requests.awake_s, 0)},
            "iohang_bugs_total": {(): self._bugs()},
            "iohang_resident_memory_bytes": {(): _resident_bytes()},
            "iohang_cpu_seconds_total": {(): time.process_time()},
            "iohang_start_time_seconds": {(): self._begun_s},
            "iohang_build_info": {(self._about.version, self._requests.engine.name): 1},
        }


COUNTER_OR_GAUGE = {GAUGE: GaugeMetricFamily, COUNTER: CounterMetricFamily}


def _text(value: str) -> str:
    """*value* as UTF-8 can have it: a path's bytes that are no text in hexadecimal."""
    return os.fsencode(value).decode(errors="backslashreplace")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # proc(5)
    return pages * os.sysconf("SC_PAGE_SIZE")
