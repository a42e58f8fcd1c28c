"""What Prometheus is told of one `Requests`, read back with prometheus_client's own parser."""

# ruff: noqa: ARG001 - pytest-trio takes the clock from each test's own arguments

from __future__ import annotations

import errno
import random
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from iohang_fuse.commands import About
from iohang_fuse.events import HangBegan, HangEnded, Op
from iohang_fuse.exposition import Exposition
from iohang_fuse.images import Image
from iohang_fuse.metrics import COUNTER, METRICS, Metrics
from iohang_fuse.rehandle import HeldBytes, Request
from iohang_fuse.requests import Requests
from iohang_fuse.tally import MOST_IMAGES, OTHERS
from tests.core.world import policy
from tests.shell.fakes import FakeBacking, Shell, Storage
from tests.shell.test_exposition import free_port, get

if TYPE_CHECKING:
    from trio.testing import MockClock

EIO = errno.EIO
ABOUT = About("/srv/nfs/vm", "/mnt/iohang", "0.1.0", 1)

Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def metrics_of(requests: Requests, about: About = ABOUT, *, name_the_mount: bool = False) -> Metrics:
    return Metrics(
        requests,
        about,
        now=trio.current_time,
        bugs=lambda: 3,
        serving=lambda: True,
        name_the_mount=name_the_mount,
    )


class Read:
    """A page, as whoever scrapes it reads it."""

    def __init__(self, metrics: Metrics) -> None:
        self.text = metrics.render().decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, metric: str, **labels: str) -> float | None:
        """The one series with exactly these labels; None if there is none."""
        found = [sample.value for sample in self.samples if sample.name == metric and sample.labels == labels]
        assert len(found) < 2
        return found[0] if found else None

    def total(self, metric: str) -> float:
        return sum(sample.value for sample in self.samples if sample.name == metric)

    def images(self) -> set[str]:
        return {sample.labels["image"] for sample in self.samples if "image" in sample.labels}


async def test_all_names_and_no_others(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Design, section 6: the names are fixed; and each series has the labels that its metric has, and no others."""
    shell = Shell.on(nursery, policy())
    shell.storage.errno = EIO
    shell.send(1)
    await trio.sleep(1)
    read = Read(metrics_of(shell.requests))
    assert {f"{name}_total" if family.type == COUNTER else name for name, family in read.families.items()} == {*METRICS}
    for name, (kind, labels, words) in METRICS.items():
        family = read.families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, words)
        assert family.samples, f"{name} has no series in an outage"
        for sample in family.samples:
            assert {*sample.labels} - {"le"} == {*labels}


async def test_an_outage_in_numbers(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """P9: "The same event feeds log, metrics and monitor", and the gauges say what there is now."""
    shell = Shell.on(nursery, policy())
    metrics = metrics_of(shell.requests)
    shell.storage.errno = errno.ETIMEDOUT
    shell.send(3, Op.WRITE)
    shell.send(2, Op.READ)
    await trio.sleep(12)
    read = Read(metrics)
    assert read("iohang_held_requests", image="disk.img", op="write") == 3
    assert read("iohang_held_requests", image="disk.img", op="read") == 2
    assert read("iohang_held_requests", image="disk.img", op="fsync") == 0
    assert read("iohang_oldest_held_seconds", image="disk.img") == pytest.approx(12, abs=0.1)
    assert read("iohang_hang_active", image="disk.img") == 1
    assert read("iohang_hangs_total", image="disk.img") == 1
    assert read("iohang_hang_duration_seconds_count") == 0
    assert read("iohang_held_bytes") == 3 * 4096
    assert read("iohang_write_logs_in_doubt") == 1
    tried = shell.storage.attempts
    assert read.total("iohang_backend_errors_total") == tried == 5 + (read("iohang_retries_total") or 0)
    assert {s.labels["errno"] for s in read.samples if s.name == "iohang_backend_errors_total"} == {"ETIMEDOUT"}
    assert read("iohang_timed_out", image="disk.img") == 0
    assert read("iohang_bugs_total") == 3

    shell.storage.errno = 0
    await trio.sleep(6)
    read = Read(metrics)
    assert read("iohang_hang_active", image="disk.img") == 0
    assert read("iohang_oldest_held_seconds", image="disk.img") == 0
    assert read.total("iohang_held_requests") == 0
    assert read("iohang_ended_total", outcome="recovered") == 5
    assert read("iohang_hangs_total", image="disk.img") == 1
    assert read("iohang_hang_duration_seconds_count") == 1
    assert read("iohang_hang_duration_seconds_sum") == pytest.approx(15, abs=0.1)
    assert read("iohang_hang_duration_seconds_bucket", le="10") == 0
    assert read("iohang_hang_duration_seconds_bucket", le="30") == 1
    assert read("iohang_hang_duration_seconds_bucket", le="+Inf") == 1


async def test_a_timed_out_image(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Words: given up, then passed on until it works again; the probe's failures are errors of the storage, too."""
    shell = Shell.on(nursery, policy(10))
    metrics = metrics_of(shell.requests)
    shell.storage.errno = EIO
    assert (await shell.answer())[1] == EIO
    assert (await shell.answer())[1] == EIO
    await trio.sleep(0.1)
    read = Read(metrics)
    assert read("iohang_timed_out", image="disk.img") == 1
    assert read("iohang_timeouts_total", image="disk.img") == 1
    assert read("iohang_ended_total", outcome="given_up") == 1
    assert read("iohang_ended_total", outcome="passed_on") == 1
    assert read("iohang_backend_errors_total", image="disk.img", op="read", errno="EIO") == 1  # the first probe
    await trio.sleep(11)
    read = Read(metrics)
    assert read("iohang_backend_errors_total", image="disk.img", op="read", errno="EIO") == 3
    shell.storage.errno = 0
    await trio.sleep(6)
    assert Read(metrics)("iohang_timed_out", image="disk.img") == 0


async def test_images_that_are_well_have_no_label(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Design: "Only images that have had an error get a label"; and it stays when they are well again, and closed."""
    shell = Shell.on(nursery, policy())
    metrics = metrics_of(shell.requests)
    other = shell.requests.opened(8, "well.img", FakeBacking(Storage()), 2)
    await shell.life(other, Op.READ, lambda: b"")
    assert Read(metrics).images() == set()
    shell.storage.errno = EIO
    shell.send(1)
    await trio.sleep(1)
    assert Read(metrics).images() == {"disk.img"}
    shell.storage.errno = 0
    await trio.sleep(5)
    await shell.requests.released(shell.handle.number)
    read = Read(metrics)
    assert read.images() == {"disk.img"}
    assert read("iohang_open_images") == 1


async def test_labels_are_bounded_while_everything_hangs(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """P10: bounded; and what has no room for a label of its own is still counted, once."""
    shell = Shell.on(nursery, policy())
    shell.storage.errno = EIO
    images = MOST_IMAGES + 50
    handles = [
        shell.requests.opened(100 + number, f"{number}.img", FakeBacking(shell.storage), 2) for number in range(images)
    ]
    for handle in handles:
        nursery.start_soon(shell.life, handle, Op.WRITE, shell.storage.attempt(), 0, 4096)
    await trio.sleep(1)
    read = Read(metrics_of(shell.requests))
    assert len(read.images()) == MOST_IMAGES + 1
    assert read("iohang_hang_active", image=OTHERS) == 50
    assert read("iohang_hangs_total", image=OTHERS) == 50
    assert read("iohang_held_requests", image=OTHERS, op="write") == 50
    for metric in ("iohang_hang_active", "iohang_hangs_total", "iohang_held_requests", "iohang_backend_errors_total"):
        assert read.total(metric) == images, metric
    shell.storage.errno = 0
    await trio.sleep(6)
    read = Read(metrics_of(shell.requests))
    assert read("iohang_hang_active", image=OTHERS) == 0
    assert read.total("iohang_held_requests") == 0


async def test_two_images_of_one_name_are_added_up(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """One that was replaced by rename while it was open has the name of the new one: two series would be refused."""
    shell = Shell.on(nursery, policy())
    twin = shell.requests.opened(8, "disk.img", FakeBacking(shell.storage), 2)
    shell.storage.errno = EIO
    shell.send(2)
    await trio.sleep(3)
    nursery.start_soon(shell.life, twin, Op.WRITE, shell.storage.attempt(), 0, 4096)
    await trio.sleep(1)
    read = Read(metrics_of(shell.requests))
    assert read("iohang_held_requests", image="disk.img", op="write") == 3
    assert read("iohang_hang_active", image="disk.img") == 2
    assert read("iohang_oldest_held_seconds", image="disk.img") == pytest.approx(4, abs=0.1)
    assert read("iohang_hangs_total", image="disk.img") == 2


async def test_a_renamed_image_keeps_its_alert(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Under its new name, from the next look on."""
    shell = Shell.on(nursery, policy())
    shell.storage.errno = EIO
    shell.send(1)
    await trio.sleep(1)
    shell.held.image = "new.img"
    read = Read(metrics_of(shell.requests))
    assert read("iohang_hang_active", image="new.img") == 1
    assert read("iohang_hang_active", image="disk.img") == 0


@pytest.mark.parametrize(
    "name",
    ["two\nlines.img", 'a "quoted" one', "C:\\n\\", r"\xff\xfe.img", "Überraschung 💾", '{image="x"} 1', "cr\r.img", "# HELP"],
)  # fmt: skip
async def test_names_come_through(name: str, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """A name may have each byte but `/` and NUL: what is scraped has it as the log does, and no name breaks the page."""
    shell = Shell.on(nursery, policy())
    shell.held.image = name
    shell.storage.errno = EIO
    shell.send(1)
    await trio.sleep(1)
    assert Read(metrics_of(shell.requests))("iohang_hang_active", image=name) == 1


async def test_paths_that_are_no_text(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    r"""SOURCE and MOUNTPOINT come from the command line, where Python has surrogates for bytes that are no UTF-8."""
    about = About("/srv/\udcff", "/mnt/\udce4\n", "0.1.0", 1)
    shell = Shell.on(nursery, policy())
    read = Read(metrics_of(shell.requests, about, name_the_mount=True))
    assert read("iohang_mount_info", source=r"/srv/\xff", mountpoint="/mnt/\\xe4\n") == 1


async def test_where_several_mounts_meet_each_series_names_its_own(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """node_exporter refuses a series that two files have."""
    shell = Shell.on(nursery, policy())
    shell.storage.errno = EIO
    shell.send(1)
    await trio.sleep(1)
    read = Read(metrics_of(shell.requests, name_the_mount=True))
    assert {sample.labels["mountpoint"] for sample in read.samples} == {"/mnt/iohang"}
    assert read("iohang_hang_active", image="disk.img", mountpoint="/mnt/iohang") == 1


async def test_a_paused_mount_says_so(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """Of one image, and of all."""
    shell = Shell.on(nursery, policy())
    metrics = metrics_of(shell.requests)
    assert Read(metrics)("iohang_holding") == 1
    shell.requests.set_holding(shell.handle.image, on=False)
    assert Read(metrics)("iohang_holding") == 0


async def test_it_answers_while_the_loop_is_stuck_and_says_for_how_long(nursery: trio.Nursery) -> None:
    """Point 1 of exposition.py: it answers while the event loop is stuck, which is then what it says."""
    shell = Shell.on(nursery, policy(blocked_after_s=0.4))
    await trio.sleep(0.2)  # `serve` has begun
    clock = trio.lowlevel.current_clock()
    metrics = Metrics(shell.requests, ABOUT, now=clock.current_time, bugs=int, serving=bool)
    port = free_port()
    exposition = Exposition(metrics.render, ("127.0.0.1", port))
    exposition.bind()
    exposition.start()
    try:
        # From here on this task never yields, so no other task runs.
        delay_s, end_s = 0.0, time.monotonic() + 30
        while delay_s < 0.5 and time.monotonic() < end_s:
            _, page = get(port)
            families = {f.name: f for f in text_string_to_metric_families(page.decode())}
            delay_s = families["iohang_loop_delay_seconds"].samples[0].value
        assert delay_s >= 0.5
    finally:
        exposition.stop()


def test_a_look_from_another_thread_never_fails() -> None:
    """Point 2 of metrics.py: "beside the event loop and without a lock"; while images and all that they have come and go."""
    requests = Requests(policy(), 1 << 30, [], write_log=1 << 20)
    metrics = Metrics(requests, ABOUT, now=time.monotonic, bugs=int, serving=bool)
    ended, failures = threading.Event(), list[BaseException]()
    looks = 0

    def look() -> None:
        nonlocal looks
        while not ended.is_set():
            try:
                _ = [*metrics.collect()]
            except BaseException as error:  # noqa: BLE001 - whatever it is
                failures.append(error)
                return
            looks += 1

    looker = threading.Thread(target=look)
    between_turns_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        looker.start()
        dice, end_s = random.Random(7), time.monotonic() + 60
        while looks < 300 and not failures and time.monotonic() < end_s:
            stir(requests, dice)
    finally:
        sys.setswitchinterval(between_turns_s)
        ended.set()
        looker.join(30)
    assert failures == []
    assert looks >= 300


def stir(requests: Requests, dice: random.Random) -> None:
    """What the event loop might do meanwhile: an image comes or goes, requests are held or not, an attempt fails, a hang ends."""
    node = dice.randrange(40)
    image = requests.images.get(node)
    if image is None:
        image = requests.images[node] = Image(node, f"{node}.img", policy(), HeldBytes(1 << 40), 0)
    elif dice.random() < 0.05:
        del requests.images[node]
    held = image.held.held
    for seq in range(dice.randrange(100)):
        held[seq] = Request(seq, Op.READ, 0, 512, 0.0)
    for seq in [*held][: dice.randrange(100)]:
        del held[seq]
    if dice.random() < 0.2:  # it makes room for another one
        requests.tally.images.pop(image.held.image, None)
    requests.tally.failed(image.held.image, dice.choice([*Op]), dice.randrange(10))
    requests.tally.tell(HangBegan(image.held.image, Op.READ, EIO, 0.0, 60.0))
    requests.tally.tell(HangEnded(image.held.image, EIO, 0.0, dice.random() * 100, 1, 1, 0, 0))
