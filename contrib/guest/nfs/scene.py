"""Inside the Debian guest: one outage, under all mounts at once, bare and with iohang-fuse; what was seen goes to stdout, as JSON.

    python3 -m contrib.guest.nfs.scene OUTAGE [--kinds v3-soft,v4.2-softerr]

Each mount has a consumer of each mode on it, and one that asks for attributes. When all have done some work the outage begins;
when it has ended the scene waits until all work again, and compares every block with what the server has.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import json
import multiprocessing
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from contrib.guest.nfs import site
from contrib.guest.nfs.load import BLOCK_BYTES, Consumer, Looker, Mode, Step, since
from contrib.guest.nfs.outages import OUTAGES, Outage, by_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

MODES: tuple[Mode, ...] = ("direct", "buffered")
WAYS = ("bare", "iohang")

INTERVAL_S = 5
"""Which is the default. With less, a recovery is bound by the kernel's client, which asks a server that has refused it each 3 s."""

IOHANG = f"timeout=5min,interval={INTERVAL_S}"

_BLOCKS = 32
_GROWING_BLOCKS = 4096  # more than are ever written
_STEPS_BEFORE = 4
_RECOVERY_LIMIT_S = 100
"""The kernel's client is deaf for 80 s at most."""

_HOPELESS_ERRORS, _AT_ONCE_S = 40, 0.5
"""Some bare mounts never recover: so many errors at once, while whoever is deaf needs seconds for each."""
_SETTLE_S = 6
"""What an old connection has still to deliver arrives in that time."""


class Hand:
    """Begins and ends the outage, from a process of its own.

    It is forked before any image is open: a fork with exec closes descriptors, and close(2) of one with unwritten data waits for
    the server.
    """

    def __init__(self, outage: Outage) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=self._serve, args=(theirs, outage), daemon=True
        )
        self._process.start()
        theirs.close()

    def do(self, what: str) -> None:
        """`begin` or `end`; raises RuntimeError with what went wrong."""
        self._ours.send(what)
        if error := self._ours.recv():
            raise RuntimeError(f"{what}: {error}")

    def close(self) -> None:
        """End it."""
        self._ours.close()
        self._process.join()

    def _serve(self, theirs: Connection, outage: Outage) -> None:
        self._ours.close()
        while True:
            try:
                what = theirs.recv()
            except EOFError:
                return
            try:
                (outage.begin if what == "begin" else outage.end)()
            except (OSError, RuntimeError) as error:
                theirs.send(str(error))
            else:
                theirs.send("")


class Watcher(threading.Thread):
    """The events of a mount's monitor, each with its time."""

    def __init__(self, kind: site.Kind) -> None:
        super().__init__(daemon=True)
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._answered = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"/run/iohang/mnt-{kind.name}.sock")
        self.start()
        self.tell("qmp_capabilities")

    def tell(self, command: str, **arguments: str) -> None:
        """Give a command, and wait for its answer."""
        self._answered.clear()
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        if not self._answered.wait(60):
            raise RuntimeError(f"{command}: no answer")

    def run(self) -> None:
        """The thread. One message a line (docs/monitor.rst)."""
        for line in self._socket.makefile("rb"):
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(str(message))
            if "return" in message:
                self._answered.set()
            if "event" in message:
                self.events.append((time.monotonic(), message))

    def close(self) -> None:
        """End it."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self._socket.close()


@dataclass(slots=True)
class Cell:
    """One mount, one way: who works on it."""

    kind: site.Kind
    way: str
    consumers: dict[Mode, Consumer] = field(default_factory=dict)
    looker: Looker | None = None

    @property
    def directory(self) -> Path:
        """What the consumers are given."""
        return self.kind.bare if self.way == "bare" else self.kind.iohang

    def image(self, outage: Outage, mode: Mode) -> str:
        """The name of a consumer's image."""
        return f"{outage.name}-{self.kind.name}-{self.way}-{mode}.img"

    def begin(self, outage: Outage) -> None:
        """Make the images at the server, and begin to work."""
        blocks = _GROWING_BLOCKS if outage.sparse else _BLOCKS
        for mode in MODES:
            name = self.image(outage, mode)
            made = self.kind.export / name
            with made.open("wb") as file:
                file.truncate(blocks * BLOCK_BYTES)
                if not outage.sparse:
                    file.write(bytes(blocks * BLOCK_BYTES))
            made.chmod(0o666)
            self.consumers[mode] = Consumer(self.directory / name, mode, blocks)
            self.consumers[mode].start()
        self.looker = Looker(self.directory / self.image(outage, "direct"))
        self.looker.start()

    def threads(self) -> list[Consumer | Looker]:
        """All of them."""
        return [*self.consumers.values(), *([self.looker] if self.looker else [])]

    def works(self, count: int, after_s: float = 0.0) -> bool:
        """Whether each consumer has done so many calls of each kind that began then or later, without an error."""
        for consumer in self.consumers.values():
            good = collections.Counter(step.call for step in since(consumer.steps, after_s) if not step.errno)
            kinds = ("write", "read") if consumer.mode == "direct" else ("write", "read", "fsync")
            if any(good[kind] < count for kind in kinds):
                return False
        return True

    def is_hopeless(self, after_s: float) -> bool:
        """Whether each consumer has had nothing but errors at once, and many, since then."""
        return all(
            sum(
                bool(step.errno) and step.ended_s - step.began_s < _AT_ONCE_S for step in since(consumer.steps, after_s)
            )
            >= _HOPELESS_ERRORS
            for consumer in self.consumers.values()
        )


class Scene:
    """One outage."""

    def __init__(self, outage: Outage, kinds: Sequence[site.Kind]) -> None:
        self.outage = outage
        self._hand = Hand(outage)
        self.watchers = {kind.name: Watcher(kind) for kind in kinds}
        self.cells = [Cell(kind, way) for kind in kinds for way in WAYS]

    def play(self) -> dict[str, Any]:
        """From the first write to the verdict."""
        for watcher in self.watchers.values():
            watcher.tell("io-hang-set", timeout=self.outage.timeout)
        for cell in self.cells:
            cell.begin(self.outage)
        self._wait(lambda: all(cell.works(_STEPS_BEFORE) for cell in self.cells), "the consumers' first calls")
        began_s = time.monotonic()
        say(f"{self.outage.name}: {self.outage.what}, for {self.outage.seconds:g} s")
        self._hand.do("begin")
        time.sleep(max(began_s + self.outage.seconds - time.monotonic(), 0))
        self._hand.do("end")
        ended_s = time.monotonic()
        say(f"{self.outage.name}: ended after {ended_s - began_s:.1f} s")
        deaf = self._recover(ended_s)
        for thread in (thread for cell in self.cells for thread in cell.threads()):
            thread.stop.set()
        for thread in (thread for cell in self.cells for thread in cell.threads()):
            thread.join(_RECOVERY_LIMIT_S)
        time.sleep(_SETTLE_S)
        result = {
            "outage": self.outage.name,
            "what": self.outage.what,
            "seconds": round(ended_s - began_s, 1),
            "lease_s": self.outage.lease_s,
            "timeout": self.outage.timeout,
            "cells": [self._verdict(cell, began_s, ended_s, deaf) for cell in self.cells],
        }
        for watcher in self.watchers.values():
            watcher.close()
        # The images stay: to remove one at the server takes away its delegation, and waits up to 45 s for each client.
        self._hand.close()
        return result

    def _recover(self, ended_s: float) -> list[Cell]:
        """Wait until all work again; those that do not."""
        with contextlib.suppress(TimeoutError):
            self._wait(
                lambda: all(cell.works(2, ended_s) or cell.is_hopeless(ended_s) for cell in self.cells),
                "all to work again",
            )
        return [cell for cell in self.cells if not cell.works(2, ended_s)]

    def _verdict(self, cell: Cell, began_s: float, ended_s: float, deaf: list[Cell]) -> dict[str, Any]:
        verdict: dict[str, Any] = {"kind": cell.kind.name, "way": cell.way, "recovered": cell not in deaf}
        for mode, consumer in cell.consumers.items():
            image = cell.kind.export / cell.image(self.outage, mode)
            steps = since(consumer.steps, 0)
            failed = [step for step in steps if step.errno]
            verdict[mode] = {
                "calls": len(steps),
                "errors": _counted(failed),
                "first_error_s": round(failed[0].ended_s - began_s, 1) if failed else None,
                "last_error_s": round(failed[-1].ended_s - ended_s, 1) if failed else None,
                "longest_call_s": round(max(step.ended_s - step.began_s for step in steps), 1),
                "again_s": _again_s(steps, ended_s),
                "lost_bytes": consumer.verify(image) * BLOCK_BYTES,
                "misread_blocks": consumer.misread,
                "ended": not consumer.is_alive(),
            }
        assert cell.looker is not None
        looked = [step for step in cell.looker.steps if began_s <= step.began_s <= ended_s]
        verdict["stat"] = {
            "calls": len(looked),
            "errors": _counted(step for step in looked if step.errno),
            "longest_s": round(max((step.ended_s - step.began_s for step in looked), default=0.0), 1),
        }
        if cell.way == "iohang":
            verdict["events"] = self._events(cell, began_s)
        return verdict

    def _events(self, cell: Cell, began_s: float) -> dict[str, list[dict[str, Any]]]:
        """Those of each image."""
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for at_s, message in self.watchers[cell.kind.name].events:
            data = message.get("data", {})
            for mode in MODES:
                if data.get("image") == cell.image(self.outage, mode):
                    kept = {
                        key: data[key]
                        for key in ("set", "op", "errno", "duration", "held-max", "given-up")
                        if key in data
                    }
                    found[mode].append({"event": message["event"], "at_s": round(at_s - began_s, 1), **kept})
        return found

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _RECOVERY_LIMIT_S
        while not condition():
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {_RECOVERY_LIMIT_S} s: {what}")
            time.sleep(0.2)


def _counted(failed: Iterable[Step]) -> dict[str, int]:
    return dict(
        collections.Counter(f"{step.call} {errno.errorcode.get(step.errno, str(step.errno))}" for step in failed)
    )


def _again_s(steps: list[Step], ended_s: float) -> float | None:
    """How long after the outage's end the first call came back well: all that was waiting then had been in the outage."""
    good = [step.ended_s for step in steps if not step.errno and step.ended_s > ended_s and step.call != "close"]
    return round(good[0] - ended_s, 1) if good else None


def say(words: str) -> None:
    """Progress, for who looks at the guest's log."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outage", choices=[outage.name for outage in OUTAGES])
    parser.add_argument("--kinds", default=",".join(kind.name for kind in site.KINDS))
    given = parser.parse_args()
    names = given.kinds.split(",")
    kinds = [kind for kind in site.KINDS if kind.name in names]
    json.dump(Scene(by_name(given.outage), kinds).play(), sys.stdout)


if __name__ == "__main__":
    main()
