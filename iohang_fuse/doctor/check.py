"""iohang-mount --check: what `iohangctl doctor` would say, before there is a mount."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from iohang_fuse import bounded, limits, presence
from iohang_fuse.doctor import findings, survey
from iohang_fuse.doctor.examination import examine
from iohang_fuse.preflight import Refusal, check_log, check_paths

if TYPE_CHECKING:
    from iohang_fuse.config import Config


def run(config: Config, *, json_: bool) -> int:
    """Print the findings; their exit code. Mounts nothing, and never waits long for SOURCE."""
    limits.raise_open_files()  # as the server would
    facts = survey.before_mount(config, lambda: _refusal(config))
    found = examine(facts)
    width = shutil.get_terminal_size((findings.WIDTH, 24)).columns
    sys.stdout.write(findings.report(facts.source, facts.mountpoint, found, json_=json_, width=width))
    return findings.exit_code(found)


def _refusal(config: Config) -> str | None:
    """Why the mount would be refused, beside what examination.py finds."""
    try:
        said = bounded.look(lambda: _refused(config), presence.LOOK_S)
    except bounded.NoAnswer:
        return f"SOURCE {config.source} or MOUNTPOINT {config.mountpoint} does not answer"
    return None if said is None else str(said)


def _refused(config: Config) -> str | None:
    try:
        check_paths(config)
        check_log(config)
    except Refusal as refusal:
        return str(refusal)
    return None
