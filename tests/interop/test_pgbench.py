"""PostgreSQL with its data directory on the mount, in bad weather, killed in an outage, and recovered.

Crash recovery is tried on both: the mount, in the next storm, and a copy of SOURCE's own disk as it was after the kill.
"""

from __future__ import annotations

import pwd
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from tests.harness import wait_until
from tests.weather import (
    DATA,
    TIMEOUT_S,
    kill_and_wait,
    output_of,
    say,
    state,
    storm_mount,
    storm_s,
)

STORM_S = 10
AGAIN_S = 3
PROGRAMS = Path("/usr/lib/postgresql/15/bin")
USER = "postgres"
CLIENTS = 6
LEDGERS = 2
SETTINGS = {
    "listen_addresses": "",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "2MB",  # less than the tables: pages are written and read all the time
    "min_wal_size": "4MB",
    "max_wal_size": "8MB",  # and checkpoints come often
    "checkpoint_timeout": "30s",
    "max_connections": "40",
    "autovacuum_naptime": "1s",
}
ERRORS = re.compile(
    r"PANIC|could not (?:read|write|fsync|extend|open)|invalid page|Input/output error|Stale file handle"
)


@pytest.fixture
def place(disk_path: Path) -> Path:
    """Where the cluster may live: a path that the user postgres may enter."""
    for name in ("initdb", "pgbench", "psql", "pg_amcheck", "pg_checksums"):
        if not (PROGRAMS / name).exists():
            pytest.fail(f"{PROGRAMS / name} is missing: apt-get install postgresql-15", pytrace=False)
    (disk_path / "sockets").mkdir()
    shutil.chown(disk_path / "sockets", USER)
    return disk_path


def as_postgres(program: str, *arguments: str | Path, timeout_s: float = 2 * TIMEOUT_S) -> str:
    """What a program of PostgreSQL prints, as the user postgres; its exit code is 0."""
    entry = pwd.getpwnam(USER)
    return output_of(
        [PROGRAMS / program, *arguments], timeout_s, user=entry.pw_uid, group=entry.pw_gid, extra_groups=[], cwd="/"
    )


class Cluster:
    """A running PostgreSQL on *data*, reached through a socket; it has seen no error when it ends."""

    def __init__(self, data: Path, place: Path, log: Path) -> None:
        self.place = place
        self._log = log
        settings = {**SETTINGS, "unix_socket_directories": str(place / "sockets")}
        entry = pwd.getpwnam(USER)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [PROGRAMS / "postgres", "-D", data, *(f"--{name}={value}" for name, value in settings.items())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=[],
                cwd="/",
            )
        try:
            wait_until(self._ready, 2 * TIMEOUT_S, f"PostgreSQL to start; its log is {log}")
        except BaseException:
            self.kill()
            raise

    def _ready(self) -> bool:
        assert self._process.poll() is None, self.log_text()
        return "ready to accept connections" in self.log_text()

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def connection(self, *words: str) -> list[str]:
        return ["-h", str(self.place / "sockets"), "-p", "5432", "-U", USER, *words]

    def query(self, text: str) -> list[str]:
        """One line for each row."""
        return as_postgres("psql", *self.connection("-XqAt", "-v", "ON_ERROR_STOP=1", "-c", text)).split()

    def ledger(self, number: int) -> list[int]:
        """The entries of one ledger."""
        return [int(word) for word in self.query(f"SELECT entry FROM ledger WHERE id = {number} ORDER BY 1")]  # noqa: S608

    def processes(self) -> list[int]:
        """The postmaster and its children; each child is in a session of its own."""
        children = []
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            with suppress(FileNotFoundError, ProcessLookupError):
                children += [int(pid) for pid in task.read_text().split()]
        return [self._process.pid, *children]

    def assert_no_errors(self) -> None:
        errors = [line for line in self.log_text().splitlines() if ERRORS.search(line)]
        assert not errors, "\n".join(errors[:20])

    def kill(self) -> None:
        """SIGKILL to all of it at once, as a power cut; returns when the last process has gone."""
        self._process.send_signal(signal.SIGSTOP)  # no more children from here on
        wait_until(lambda: state(self._process.pid) in "TXZ", TIMEOUT_S, "the postmaster to stop")
        kill_and_wait(self.processes())
        self._process.wait(TIMEOUT_S)

    def stop(self) -> None:
        """A clean end, with a checkpoint."""
        self._process.send_signal(signal.SIGINT)  # the fast shutdown
        assert self._process.wait(2 * TIMEOUT_S) == 0, self.log_text()
        self.assert_no_errors()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.poll() is None:
            self.kill()


class Ledger:
    """A client that inserts numbers, one to a transaction; *acknowledged* is the last whose COMMIT has returned."""

    def __init__(self, cluster: Cluster, number: int, last: int) -> None:
        self.number = number
        self.acknowledged = last
        self._process = subprocess.Popen(
            [PROGRAMS / "psql", *cluster.connection("-XqAt", "-v", "ON_ERROR_STOP=1")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            while True:
                following = self.acknowledged + 1
                # The INSERT is a transaction, and psql goes on to the \echo when the server has said COMMIT.
                self._process.stdin.write(
                    f"INSERT INTO ledger VALUES ({self.number}, {following});\n\\echo {following}\n"  # noqa: S608
                )
                self._process.stdin.flush()
                if self._process.stdout.readline().strip() != str(following):
                    return
                self.acknowledged = following

    def assert_working(self) -> None:
        assert self._process.poll() is None, f"the ledger {self.number} has seen an error"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(10)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


@dataclass
class Load:
    """pgbench and the ledgers; *transactions* is how many of pgbench's were acknowledged, as its own log says."""

    pgbench: subprocess.Popen[str]
    ledgers: list[Ledger]
    logs: Path

    def assert_working(self) -> None:
        assert self.pgbench.poll() is None, f"pgbench has ended: {self.pgbench.communicate()}"
        for ledger in self.ledgers:
            ledger.assert_working()

    def work_until(self, end_s: float) -> None:
        """Fails as soon as a client has seen an error."""
        while time.monotonic() < end_s:
            self.assert_working()
            time.sleep(0.1)

    @property
    def acknowledged(self) -> dict[int, int]:
        return {ledger.number: ledger.acknowledged for ledger in self.ledgers}

    @property
    def transactions(self) -> int:
        return sum(len(path.read_text().splitlines()) for path in self.logs.glob("transactions*"))

    def end(self) -> None:
        """After the server's end: the clients notice, and pgbench writes its log."""
        for ledger in self.ledgers:
            ledger.end()
        try:
            self.pgbench.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.pgbench.kill()
            self.pgbench.communicate()
            raise


def start_load(cluster: Cluster, logs: Path) -> Load:
    """Load on the *cluster*; each ledger goes on after its last number there, which need not have been acknowledged."""
    logs.mkdir()
    pgbench = subprocess.Popen(
        [
            PROGRAMS / "pgbench", *cluster.connection("-n", "-c", str(CLIENTS), "-T", "100000", "-l"),
            f"--log-prefix={logs}/transactions", USER,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    return Load(pgbench, [Ledger(cluster, number, len(cluster.ledger(number))) for number in range(LEDGERS)], logs)


def assert_sound(cluster: Cluster, acknowledged: dict[int, int], transactions: int) -> None:
    """Every acknowledged commit is there, and whole."""
    sums = cluster.query(
        "SELECT sum(abalance) FROM pgbench_accounts UNION ALL SELECT sum(tbalance) FROM pgbench_tellers UNION ALL "
        "SELECT sum(bbalance) FROM pgbench_branches UNION ALL SELECT coalesce(sum(delta), 0) FROM pgbench_history"
    )
    assert len(sums) == 4
    assert len(set(sums)) == 1, f"accounts, tellers, branches and history disagree: {sums}"
    history = int(cluster.query("SELECT count(*) FROM pgbench_history")[0])
    assert history >= transactions, f"{transactions} transactions were acknowledged, {history} are there"
    for number, last in acknowledged.items():
        found = cluster.ledger(number)
        missing = sorted({*range(1, last + 1)} - {*found})
        assert not missing, f"ledger {number}: {missing[:20]} of {last} were acknowledged and are not there"
        assert found == [*range(1, len(found) + 1)]
        assert len(found) <= last + 1, f"ledger {number} has {len(found)}, of which {last} were acknowledged"
    cluster.assert_no_errors()


def assert_sound_without_the_mount(
    disk: Path, place: Path, name: str, acknowledged: dict[int, int], transactions: int
) -> None:
    """The same on a copy of SOURCE's disk, recovered if need be; tables, indexes and checksums are right, too."""
    data = place / name
    shutil.copytree(disk / "data", data)
    for path in [data, *data.rglob("*")]:
        shutil.chown(path, USER, USER)
    (data / "postmaster.pid").unlink(missing_ok=True)
    with Cluster(data, place, place / f"{name}.log") as cluster:
        assert_sound(cluster, acknowledged, transactions)
        as_postgres("pg_amcheck", *cluster.connection("--install-missing", "--heapallindexed", "-d", USER))
        cluster.stop()
    as_postgres("pg_checksums", "--check", "-D", data)


def create_cluster(disk: Path, place: Path) -> None:
    """A data directory with checksums and pgbench's tables, made on the disk itself."""
    (disk / "data").mkdir()
    shutil.chown(disk / "data", USER, USER)
    as_postgres("initdb", "-k", "-A", "trust", "--no-sync", "--no-locale", "--wal-segsize=1", "-D", disk / "data")
    with Cluster(disk / "data", place, place / "first.log") as cluster:
        as_postgres("pgbench", *cluster.connection("-i", "-q", "-s", "1", USER))
        cluster.query("CREATE TABLE ledger (id integer, entry integer, PRIMARY KEY (id, entry))")
        cluster.stop()


@pytest.mark.slow
@pytest.mark.alone
def test_postgresql_is_killed_in_an_outage_and_recovers(place: Path, tmp_path: Path) -> None:
    """P1 and P3 for PostgreSQL: it sees no error, and SOURCE's disk alone has every commit that it has acknowledged."""
    (place / "disk").mkdir()
    create_cluster(place / "disk", place)
    with storm_mount(place, tmp_path, DATA, "allow_other", "default_permissions") as storm, ExitStack() as stack:
        data = storm.mountpoint / "data"
        cluster = stack.enter_context(Cluster(data, place, place / "storm.log"))
        load = start_load(cluster, tmp_path / "load")
        with storm.weather() as weather:
            end_s = time.monotonic() + storm_s(STORM_S)
            load.work_until(end_s)
            wait_until(weather.in_outage.is_set, what="an outage")
            cluster.kill()
        load.end()
        cluster.assert_no_errors()
        acknowledged, transactions = load.acknowledged, load.transactions
        say(f"{transactions} transactions of pgbench, ledgers {acknowledged}; killed in an outage")
        assert transactions > 0
        assert_sound_without_the_mount(storm.disk, place, "after-the-kill", acknowledged, transactions)

        with storm.weather(number=1):
            cluster = stack.enter_context(Cluster(data, place, place / "recovered.log"))
            assert "database system was not properly shut down" in cluster.log_text()
            assert_sound(cluster, acknowledged, transactions)
            load = start_load(cluster, tmp_path / "load-again")
            end_s = time.monotonic() + storm_s(AGAIN_S)
            load.work_until(end_s)
            cluster.stop()
        load.end()
        acknowledged, transactions = load.acknowledged, transactions + load.transactions
        say(f"{transactions} transactions of pgbench, ledgers {acknowledged}; stopped")
        assert_sound_without_the_mount(storm.disk, place, "after-the-end", acknowledged, transactions)
        storm.assert_masked()
