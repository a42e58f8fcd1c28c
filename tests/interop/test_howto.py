"""What docs/howto/monitoring.rst has for programs, run against a real mount."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.harness import FlakySource, Mount, wait_until

MONITORING = Path(__file__).parents[2] / "docs/howto/monitoring.rst"


def test_a_client_of_ones_own(tmp_path: Path) -> None:
    """The client in Python works, and "A hang gives one BLOCK_IO_HANG with set true and one with set false"."""
    (block,) = re.findall(r"^\.\. code-block:: python\n\n(.*?)^\S", MONITORING.read_text(), re.MULTILINE | re.DOTALL)
    program, at = textwrap.dedent(block), "/run/iohang/mnt-iohang.sock"
    assert at in program
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.img").write_bytes(bytes(4096))
    said = tmp_path / "said"
    with (
        FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(tmp_path / "src", tmp_path / "mnt", "interval=0.2", f"monitor={tmp_path}/m", log=tmp_path / "log"),
        (tmp_path / "mnt/a.img").open("rb", buffering=0) as image,
        said.open("w") as out,
        subprocess.Popen([sys.executable, "-u", "-c", program.replace(at, f"{tmp_path}/m")], stdout=out) as client,
    ):
        try:
            wait_until(lambda: "a.img healthy 0" in said.read_text(), timeout_s=60, what="the client to ask")
            flaky.fail("read * errno=EIO")
            with subprocess.Popen(["cat", image.name], stdout=subprocess.DEVNULL) as consumer:
                wait_until(lambda: "'set': True" in said.read_text(), timeout_s=60, what="the begin")
                flaky.heal()
                assert consumer.wait(60) == 0
            wait_until(lambda: "'set': False" in said.read_text(), timeout_s=60, what="the end")
        finally:
            client.kill()
    assert said.read_text().count("BLOCK_IO_HANG") == 2
