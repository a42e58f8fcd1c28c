"""docs/tutorial.rst, word for word: its commands in one shell, in order, and what they print.

In a mount namespace with a /srv, /mnt and /run of its own, so that nothing of this machine is in the way, and in a PID namespace,
so that nothing is left. What is asked (`iohangctl status`, `cat`) is asked until the answer is the one of the tutorial: nobody
types as fast as this test.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.interop.own import OWN, kept

if TYPE_CHECKING:
    from collections.abc import Iterator

TUTORIAL = Path(__file__).parents[2] / "docs/tutorial.rst"
PROMPT = "    # "
ANSWERED_S = 60
"""How long an answer may take to be the right one: a timeout of 30 s, an interval of 5 s, and a busy machine."""

ENDED_S = 90
"""How long a command may take: `wait` for a writer whose timeout is 30 s."""


@dataclass
class Step:
    """One command and what stands below it."""

    command: str
    shown: str = ""

    @property
    def asks(self) -> bool:
        """Whether it may be repeated: a question, or what does nothing where it fails."""
        return bool(re.match(r"iohangctl (status|list|held|check)\b|cat |tail |umount ", self.command))

    def fits(self, output: str) -> bool:
        """Whether *output* is what the tutorial shows, but for `...` and the width of columns."""
        shown = re.escape(" ".join(self.shown.split())).replace(r"\.\.\.", ".*")
        return re.fullmatch(shown, " ".join(output.split())) is not None


def steps(text: str) -> list[Step]:
    """All commands of the tutorial, in order."""
    found: list[Step] = []
    below = False
    for line in text.splitlines():
        if line.startswith(PROMPT):
            found.append(Step(line.removeprefix(PROMPT)))
            below = True
        elif below and line.startswith("    "):
            found[-1].shown += line + "\n"
        elif line:
            below = False
    return found


class Shell:
    """bash as root, in namespaces of its own."""

    def __init__(self) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", **kept()},
        )
        assert self.run(f"{OWN}\nown /srv /mnt /run") == (0, "")

    def run(self, command: str) -> tuple[int, str]:
        """The exit code and the output of *command*."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f'{command}\necho "@@$?@@"\n'.encode())
        self._process.stdin.flush()
        output = ""
        deadline = time.monotonic() + ENDED_S
        while not (end := re.search(r"@@(\d+)@@\n$", output)):
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{command!r} does not end; so far: {output}"
            read = os.read(self._process.stdout.fileno(), 65536).decode()
            assert read, f"the shell has ended in {command!r}: {output}"
            output += read
        return int(end[1]), output[: end.start()]

    def close(self) -> None:
        self._process.kill()  # and with it all that is in its PID namespace
        self._process.communicate()


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


def test_the_tutorial_is_true(shell: Shell) -> None:
    """docs/tutorial.rst: "Lines that begin with # are what you type; what stands below them is what you should see"."""
    commands = steps(TUTORIAL.read_text())
    assert len(commands) > 30
    for step in commands:
        deadline = time.monotonic() + ANSWERED_S
        code, output = shell.run(step.command)
        while step.asks and not step.fits(output) and time.monotonic() < deadline:
            time.sleep(0.1)
            code, output = shell.run(step.command)
        assert step.fits(output), f"{step.command}\n-- shows:\n{output}\n-- and not:\n{step.shown}"
        assert code == 0 or step.shown, f"{step.command}: exit code {code}"
