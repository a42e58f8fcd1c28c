"""A real Prometheus, and a real node_exporter, that look at real mounts during real outages."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from contrib.bench.isolation import Client
from iohang_fuse import cli
from tests.core.test_monitoring import DASHBOARD, FOLDER, expressions
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
BLOCK = 4096
ODD_NAME = b'an "odd"\nname\\\xff.img'
AS_TEXT = 'an "odd"\nname\\\\xff.img'

Program = "Callable[[str, str], str]"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def fetch(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as response:
        text: str = response.read().decode()
        return text


class Process:
    """A program that runs while the block does, and answers at *port*."""

    def __init__(self, command: list[str], port: int, log: Path, ready: str) -> None:
        self.port = port
        with log.open("ab") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: self._answers(ready), timeout_s=60, what=f"{command[0]}; its log:\n{log.read_text()}")
        except BaseException:
            self.stop()
            raise

    def _answers(self, path: str) -> bool:
        try:
            fetch(self.port, path)
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Prometheus(Process):
    """Debian's, with the shipped rules, which looks at *targets* (port, mount point) every second."""

    def __init__(self, program: str, place: Path, targets: dict[int, Path]) -> None:
        place.mkdir()
        shipped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        shipped["rule_files"] = [str(FOLDER / "iohang-alerts.yml")]
        (job,) = (job for job in shipped["scrape_configs"] if job["job_name"] == "iohang")
        job["static_configs"] = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"mountpoint": str(path)}} for port, path in targets.items()
        ]
        shipped["scrape_configs"] = [job]
        (place / "prometheus.yml").write_text(yaml.safe_dump(shipped))
        port = free_port()
        command = [
            program, f"--config.file={place / 'prometheus.yml'}", f"--storage.tsdb.path={place / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]  # fmt: skip
        super().__init__(command, port, place / "log", "/-/ready")

    def _api(self, what: str, **arguments: str) -> Any:
        try:
            answer = json.loads(fetch(self.port, f"/api/v1/{what}?{urllib.parse.urlencode(arguments)}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{what} {arguments}: {error.read().decode()}") from None
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> dict[str, float]:
        """By image, or other label that tells them apart: the latest values."""
        return {
            each["metric"].get("image", each["metric"].get("outcome", "")): float(each["value"][1])
            for each in self._api("query", query=expression)["result"]
        }

    def value(self, expression: str) -> float | None:
        """Of the only series; None if there is none."""
        return next(iter(self.query(expression).values()), None)

    def firing(self, alert: str) -> list[dict[str, Any]]:
        """The alerts of that name that fire now."""
        return [
            each
            for each in self._api("alerts")["alerts"]
            if each["labels"]["alertname"] == alert and each["state"] == "firing"
        ]

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = self._api("metadata")
        return found


@contextmanager
def running(process: Process) -> Iterator[Any]:
    try:
        yield process
    finally:
        process.stop()


class Site:
    """A source that fails on command with three images, a mount above it, and a Prometheus that looks at that."""

    def __init__(self, flaky: FlakySource, mount: Mount, port: int, prometheus: Prometheus) -> None:
        self.flaky = flaky
        self.mount = mount
        self.port = port
        self.prometheus = prometheus

    @contextmanager
    def requests(self, count: int, kind: str = "read", name: str | bytes = "a.img") -> Iterator[list[int | None]]:
        """*count* at once by native AIO; yields their results, which are there at the end."""
        results: list[int | None] = []
        consumer = Client(
            Path(os.fsdecode(os.path.join(os.fsencode(self.mount.mountpoint), os.fsencode(name)))), kind, count
        )
        consumer.start()
        yield results
        consumer.join(60)
        assert not consumer.is_alive()
        results += [request.result for request in consumer.requests]


@contextmanager
def site(place: Path, program: Callable[[str, str], str], *options: str) -> Iterator[Site]:
    (place / "real").mkdir()
    for name in (b"a.img", b"b.img", ODD_NAME):
        (place / "real" / os.fsdecode(name)).write_bytes(bytes(8 * MIB))
    port = free_port()
    more = (f"metrics=127.0.0.1:{port}", "interval=1", "monitor=none", *options)
    with (
        FlakySource(place / "real", place / "src", place / "trigger", place / "flaky.log") as flaky,
        Mount(place / "src", place / "mnt", *more, log=place / "mnt.log") as mount,
        running(
            Prometheus(program("prometheus", "prometheus"), place / "prometheus", {port: mount.mountpoint})
        ) as prometheus,
    ):
        wait_until(lambda: prometheus.value("up") == 1, timeout_s=60)  # it looks for its targets every five seconds
        try:
            yield Site(flaky, mount, port, prometheus)
        finally:
            flaky.heal()


# ---- an outage, seen by Prometheus


def test_an_outage_seen_by_prometheus(tmp_path: Path, program: Program) -> None:
    """Issue: "Tested with a real Prometheus scraping a real outage": the alert fires, and the numbers are what happened."""
    with site(tmp_path, program, "timeout=600") as at:
        asked = at.prometheus
        with at.requests(20, name="b.img") as results:
            pass
        assert results == [BLOCK] * 20
        fd = os.open(at.mount.mountpoint / "b.img", os.O_WRONLY)
        for number in range(3):
            os.pwrite(fd, b"x" * BLOCK, number * BLOCK)
        os.fsync(fd)
        os.close(fd)
        at.flaky.fail("read,write,fsync a.img errno=ETIMEDOUT")
        began_s = time.monotonic()
        with at.requests(30) as results:
            wait_until(lambda: asked.firing("IohangImageHangs"), timeout_s=90)
            (alert,) = asked.firing("IohangImageHangs")
            assert alert["labels"].items() >= {
                "image": "a.img", "severity": "warning", "mountpoint": str(at.mount.mountpoint), "instance": f"127.0.0.1:{at.port}",
            }.items()  # fmt: skip
            assert f"iohangctl -m {at.mount.mountpoint} status" in alert["annotations"]["description"]
            assert asked.query("sum by (image) (iohang_held_requests)") == {"a.img": 30}
            assert asked.query('iohang_held_requests{op="read"}') == {"a.img": 30}
            (oldest_s,) = asked.query("iohang_oldest_held_seconds").values()
            assert 10 <= oldest_s <= time.monotonic() - began_s + 1
            assert asked.value('iohang_backend_errors_total{errno="ETIMEDOUT", op="read", image="a.img"}')
            assert asked.query("iohang_backend_errors_total").keys() == {"a.img"}, "an image that is well has no label"
            at.flaky.heal()
        hung_s = time.monotonic() - began_s
        assert results == [BLOCK] * 30
        wait_until(lambda: not asked.firing("IohangImageHangs"), timeout_s=60)
        wait_until(lambda: asked.value("iohang_hang_duration_seconds_count") == 1, timeout_s=60)
        assert asked.query("iohang_hangs_total") == {"a.img": 1}
        assert asked.query("iohang_ended_total") == {"recovered": 30, "given_up": 0, "passed_on": 0}
        assert 10 <= (asked.value("iohang_hang_duration_seconds_sum") or 0) <= hung_s + 1
        operations = [asked.value(f'iohang_operations_total{{op="{op}"}}') for op in ("read", "write", "fsync")]
        assert operations == [50, 3, 1]
        transferred = [asked.value(f'iohang_io_bytes_total{{direction="{way}"}}') for way in ("read", "written")]
        assert transferred == [50 * BLOCK, 3 * BLOCK]
        assert asked.value("iohang_oldest_held_seconds") == 0
        assert asked.value("min_over_time(iohang_loop_delay_seconds[10s])") == 0
        assert not asked.firing("IohangImageTimedOut")
        check_that_all_is_understood(at)


def check_that_all_is_understood(at: Site) -> None:
    """Each expression of the rules and the dashboard is one; kinds and words are Prometheus' now."""
    for expression in expressions():
        if not expression.startswith("label_values"):
            at.prometheus.query(
                expression.replace("$__rate_interval", "1m").replace("$instance", ".*").replace("$mountpoint", ".*")
            )
    told = at.prometheus.metadata()
    assert told["iohang_hangs_total"] == [{"type": "counter", "help": "Hangs that have begun.", "unit": ""}]
    variables = [each["definition"] for each in DASHBOARD["templating"]["list"] if "definition" in each]
    for definition in variables:
        metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", definition).groups()  # type: ignore[union-attr]
        assert at.prometheus._api("query", query=f'{metric}{{{label}!=""}}')["result"], definition


def test_a_timeout_seen_by_prometheus(tmp_path: Path, program: Program) -> None:
    """Design: after its first give-up an image is timed out: the alert that guests have had errors fires. Its name is odd."""
    with site(tmp_path, program, "timeout=3") as at:
        asked = at.prometheus
        still_open = os.open(os.fsencode(at.mount.mountpoint) + b"/" + ODD_NAME, os.O_RDWR)
        try:
            at.flaky.fail("read,write,fsync * errno=EIO")
            with at.requests(5, "write", ODD_NAME) as results:
                pass
            assert all(result is not None and result < 0 for result in results)
            wait_until(lambda: asked.query("iohang_timed_out") == {AS_TEXT: 1}, timeout_s=60)
            wait_until(lambda: asked.firing("IohangImageTimedOut"), timeout_s=60)
            (alert,) = asked.firing("IohangImageTimedOut")
            assert alert["labels"]["image"] == AS_TEXT
            assert alert["labels"]["severity"] == "critical"
            assert asked.query("iohang_timeouts_total") == {AS_TEXT: 1}
            assert asked.query("iohang_ended_total") == {"recovered": 0, "given_up": 5, "passed_on": 0}
            page = fetch(at.port)
            at.flaky.heal()
            wait_until(lambda: asked.query("iohang_timed_out") == {AS_TEXT: 0}, timeout_s=60)
        finally:
            at.flaky.heal()
            os.close(still_open)
    promtool = program("promtool", "prometheus")
    linted = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


def test_a_killed_server_seen_by_prometheus(tmp_path: Path, program: Program) -> None:
    """Issue: "server gone/absent". What uses the mount has ENOTCONN now, and nobody else says so."""
    with site(tmp_path, program) as at:
        at.mount.process.kill()
        at.mount.process.wait()
        wait_until(lambda: at.prometheus.firing("IohangServerGone"), timeout_s=120)
        (alert,) = at.prometheus.firing("IohangServerGone")
        assert alert["labels"].items() >= {"mountpoint": str(at.mount.mountpoint), "severity": "critical"}.items()
        subprocess.run(["umount", "-l", str(at.mount.mountpoint)], check=True)


def test_it_answers_while_the_source_is_dead(tmp_path: Path, program: Program) -> None:
    """Issue: it must answer while the source is dead: here every call of it blocks, and 1,000 requests are held."""
    with site(tmp_path, program, "timeout=600", "blocked_after=0.5") as at:
        at.flaky.fail("read,write,fsync a.img errno=EIO")
        with at.requests(1000) as results:
            wait_until(lambda: 'iohang_held_requests{image="a.img",op="read"} 1000.0' in fetch(at.port), timeout_s=60)
            at.flaky.fail("* * hang")
            count = "count_over_time(up[10m])"
            before = at.prometheus.value(count) or 0
            wait_until(lambda: (at.prometheus.value(count) or 0) >= before + 5, timeout_s=60)
            assert at.prometheus.value("min_over_time(up[3s])") == 1
            assert at.prometheus.query('iohang_held_requests{op="read"}') == {"a.img": 1000}
            at.flaky.heal()
        assert results == [BLOCK] * 1000


# ---- a file, read by node_exporter


def test_two_mounts_seen_by_node_exporter(tmp_path: Path, program: Program) -> None:
    """Metrics in files, of two mounts of one host: node_exporter takes both, and each series says whose it is."""
    folder, port = tmp_path / "textfiles", free_port()
    folder.mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.img").write_bytes(bytes(MIB))
    command = [
        program("prometheus-node-exporter", "prometheus-node-exporter"), "--collector.disable-defaults", "--collector.textfile",
        f"--collector.textfile.directory={folder}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    files = [folder / f"iohang-{name}.prom" for name in ("one", "two")]
    options = ("timeout=600", "interval=1", "monitor=none")
    with (
        FlakySource(tmp_path / "two", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(tmp_path / "one", tmp_path / "m1", f"metrics={files[0]}", *options, log=tmp_path / "1.log") as one,
        Mount(tmp_path / "src", tmp_path / "m2", f"metrics={files[1]}", *options, log=tmp_path / "2.log") as two,
        running(Process(command, port, tmp_path / "exporter.log", "/")),
    ):
        flaky.fail("read,write,fsync * errno=EIO")
        consumer = Client(two.mountpoint / "a.img", "read", 3)
        consumer.start()
        hangs = f'iohang_hang_active{{image="a.img",mountpoint="{two.mountpoint}"}} 1'
        wait_until(lambda: hangs in fetch(port), timeout_s=60)
        page = fetch(port)
        assert f'iohang_serving{{mountpoint="{one.mountpoint}"}} 1' in page
        assert f'iohang_serving{{mountpoint="{two.mountpoint}"}} 1' in page
        assert "node_textfile_scrape_error 0" in page
        for file in files:
            assert f'node_textfile_mtime_seconds{{file="{file}"}}' in page
        flaky.heal()
        consumer.join(60)
        one.process.kill()
        one.process.wait()
        two.stop()
        assert [*folder.glob("*.prom")] == [files[0]], (
            "one ended in order, of the other the alert IohangFileIsStale tells"
        )
    linted = subprocess.run(
        [program("promtool", "prometheus"), "check", "metrics"],
        input=files[0].read_text(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


# ---- what cannot be had


def test_what_cannot_be_had_is_refused_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bad input gets one clear line that says what would be right; nothing is mounted, and nothing left behind."""
    (tmp_path / "real").mkdir()
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()

    def refusal(metrics: str) -> str:
        options = f"metrics={metrics},monitor={tmp_path / 'm.sock'},log={tmp_path / 'refused.log'}"
        assert cli.main([str(tmp_path / "real"), str(mountpoint), "-o", options]) == 2
        assert not mountpoint.is_mount()
        assert not (tmp_path / "m.sock").exists()
        (line,) = capfd.readouterr().err.splitlines()
        return line

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        words = f"iohang-mount: metrics={where}: EADDRINUSE (Address already in use); say another HOST:PORT, or none"
        assert refusal(where) == words
    where = f"{tmp_path}/none/iohang.prom"
    words = "ENOENT (No such file or directory); say another file in a directory that is there, or none"
    assert refusal(where) == f"iohang-mount: metrics={where}: {words}"
    where = f"{tmp_path}/iohang.prom"
    with Mount(tmp_path / "real", tmp_path / "other", f"metrics={where}", "monitor=none", log=tmp_path / "log"):
        words = "another mount writes it; say another file in a directory that is there, or none"
        assert refusal(where) == f"iohang-mount: metrics={where}: {words}"
    assert not Path(where).exists()


def test_in_the_background(tmp_path: Path) -> None:
    """As mount(8) mounts it: the metrics are there when mount(8) returns, and gone after umount(8)."""
    (tmp_path / "real").mkdir()
    (tmp_path / "mnt").mkdir()
    port = free_port()
    options = f"metrics=127.0.0.1:{port},monitor=none,log={tmp_path / 'log'}"
    command = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "real"), str(tmp_path / "mnt"), "-o", options]
    subprocess.run(command, check=True, timeout=60)
    try:
        assert "\niohang_serving 1.0\n" in fetch(port)
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)

    def gone() -> bool:
        try:
            fetch(port)
        except OSError:
            return True
        return False

    wait_until(gone)


def test_a_mount_that_is_about_to_end_says_so(tmp_path: Path) -> None:
    """P8: a second SIGTERM detaches; the server stays while a write is inside a system call, and can still be asked."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.img").write_bytes(bytes(MIB))
    port = free_port()
    options = (f"metrics=127.0.0.1:{port}", "monitor=none", "blocked_after=0.5")
    with (
        FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "log") as mount,
    ):
        flaky.fail("write * hang")
        consumer = Client(mount.mountpoint / "a.img", "write", 1)
        consumer.start()
        wait_until(lambda: 'iohang_hang_active{image="a.img"} 1.0' in fetch(port), timeout_s=60)
        assert "\niohang_serving 1.0\n" in fetch(port)
        mount.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stays mounted" in mount.log_text(), timeout_s=60)
        assert "\niohang_serving 1.0\n" in fetch(port)
        mount.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "\niohang_serving 0.0\n" in fetch(port), timeout_s=60)
        flaky.heal()
        consumer.join(60)
        assert mount.process.wait(60) == 0


# ---- promtool, and Zabbix


@pytest.mark.parametrize(
    "words", ["check rules iohang-alerts.yml", "check config prometheus.yml", "test rules iohang-alerts-test.yml"]
)
def test_promtool_is_content(words: str, program: Program) -> None:
    """Issue: "`promtool check`ing rules and names"; and each alert fires where it has to, and not where not."""
    command = [program("promtool", "prometheus"), *words.split()]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_the_keys_for_zabbix(tmp_path: Path) -> None:
    """contrib/monitoring/zabbix-agent.conf, as the agent runs it: `$1` is the key's argument, and /bin/sh has the rest."""
    conf = (FOLDER / "zabbix-agent.conf").read_text()
    keys = dict(re.findall(r"^UserParameter=(\S+)\[\*\],(.*)$", conf, re.MULTILINE))
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.img").write_bytes(bytes(MIB))

    def ask(key: str) -> str:
        shell = ["/bin/sh", "-c", keys[key].replace("$1", str(tmp_path / "mnt"))]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert ask("iohang.check") == "3"
    with (
        FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(tmp_path / "src", tmp_path / "mnt", "interval=1", log=tmp_path / "log") as mount,
    ):
        assert ask("iohang.check") == "0"
        flaky.fail("read * errno=EIO")
        consumer = Client(mount.mountpoint / "a.img", "read", 2)
        consumer.start()
        wait_until(lambda: ask("iohang.check") == "1", timeout_s=60)
        assert ask("iohang.sick").startswith("IOHANG WARNING - a.img: hanging since")
        status = json.loads(ask("iohang.status"))
        assert (status["held"], status["hanging"], status["timed-out"], status["held-bytes"]) == (2, 1, 0, 0)
        assert [image["image"] for image in status["images"] if image["state"] != "healthy"] == ["a.img"]
        flaky.heal()
        consumer.join(60)
