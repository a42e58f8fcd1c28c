"""Outages of a real NFS server, under six kinds of mount, bare and with iohang-fuse, in a Debian guest.

    python -m contrib.guest.nfs                      all of them; a table, and exit code 1 if a promise was not kept
    python -m contrib.guest.nfs dropped rebooted     these
    python -m contrib.guest.nfs --docs docs          and write the table to docs/outages-on-nfs.rst
    python -m contrib.guest.nfs overhead             another scene, printed as JSON: fio against the bare mount; `late`: writes that
                                                     land late; `apps`: programs in an outage; `functions`: users, locks and so on

Needs root, QEMU, and once debootstrap (`contrib/setup --test` installs them). The guest's image is built anew by
`python -m contrib.guest.debian.image --rebuild`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from contrib.guest.kernel import GuestUnavailableError
from contrib.guest.nfs import report
from contrib.guest.nfs.guest import Guest
from contrib.guest.nfs.outages import LEASE_S, OUTAGES, by_name
from contrib.guest.nfs.scene import INTERVAL_S
from contrib.guest.nfs.site import GRACE_S, QUICK

OTHERS = ("overhead", "late", "apps", "functions")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [outage.name for outage in OUTAGES]
    parser.add_argument(
        "scene", nargs="*", metavar="SCENE", help=f"of outages: {', '.join(names)}; others: {', '.join(OTHERS)}"
    )
    parser.add_argument("--docs", type=Path, metavar="DIRECTORY", help="write outages-on-nfs.rst and .json there")
    parser.add_argument(
        "--timing", default=QUICK, metavar="OPTIONS", help=f"of the mounts: nfs(5)'s timeo and retrans ({QUICK})"
    )
    given = parser.parse_args()
    for name in given.scene:
        if name not in (*names, *OTHERS):
            parser.error(f"there is no scene {name}; there are {', '.join((*names, *OTHERS))}")
    try:
        return _play(given.scene or names, given.docs, given.timing)
    except GuestUnavailableError as error:
        print(error, file=sys.stderr)
        return 2


def _play(names: list[str], docs: Path | None, timing: str) -> int:
    began_s = time.monotonic()
    scenes, problems = [], []
    with tempfile.TemporaryDirectory(prefix="iohang-nfs-", dir="/var/tmp") as folder:
        _say("the guest's image: built the first time, which takes some minutes")
        guest = Guest(Path(folder), timing)
        _say("the guest boots")
        with guest.debian as debian:
            kernel = debian.run("uname", "-r").strip()
            for number, name in enumerate(names, 1):
                _say(f"{number} of {len(names)}: {name}")
                if name in OTHERS:
                    guest.set_up()
                    print(json.dumps(json.loads(guest.python(name)), indent=1), flush=True)
                    continue
                scene = guest.outage(name)
                scenes.append(scene)
                problems += report.problems(scene, again_s=INTERVAL_S + 1, errors_pass=by_name(name).errors_pass)
                print("\n".join(report.lines(scene)), flush=True)
    minutes = (time.monotonic() - began_s) / 60
    for problem in problems:
        print(f"NOT KEPT: {problem}")
    if docs is not None:
        values = {"kernel": kernel, "interval": INTERVAL_S, "lease": LEASE_S, "grace": GRACE_S}
        expected = {outage.name: outage.expected for outage in OUTAGES}
        (docs / "outages-on-nfs.rst").write_text(report.page(scenes, expected, **values))
        lines = ",\n".join(json.dumps(scene) for scene in scenes)
        (docs / "outages-on-nfs.json").write_text(f"[\n{lines}\n]\n")
    if scenes:
        print(f"{len(problems)} promises not kept in {len(scenes)} outages; {minutes:.1f} minutes")
    return 1 if problems else 0


def _say(words: str) -> None:
    print(f"nfs: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
