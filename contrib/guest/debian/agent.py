"""Inside the Debian guest: runs what the host asks for. guest.py is the host's side.

One JSON value a line, over a virtio-serial port: `{"id": 1, "command": ["uname", "-r"]}` in, and out, when it has ended,
`{"id": 1, "code": 0, "out": "6.1.0...", "err": ""}`. Commands run beside one another, so that one that hangs delays no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
from typing import Any

PORT = "/dev/virtio-ports/iohang.control"

_one_at_a_time = threading.Lock()


def answer(fd: int, value: dict[str, Any]) -> None:
    """One line, whole."""
    line = json.dumps(value).encode() + b"\n"
    with _one_at_a_time:
        while line:
            line = line[os.write(fd, line) :]


def carry_out(fd: int, request: dict[str, Any]) -> None:
    """Run one command to its end."""
    try:
        done = subprocess.run(
            request["command"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except OSError as error:
        code, out, err = 127, "", str(error)
    answer(fd, {"id": request["id"], "code": code, "out": out, "err": err})


def main() -> None:
    """Until the guest ends."""
    fd = os.open(PORT, os.O_RDWR)
    answer(fd, {"ready": True})
    with os.fdopen(os.dup(fd), "rb") as requests:
        for line in requests:
            threading.Thread(target=carry_out, args=(fd, json.loads(line)), daemon=True).start()


if __name__ == "__main__":
    main()
