"""Directories of a mount namespace's own, for scripts in bash: empty, but for what the test itself runs from.

This tree and its virtual environment may lie beneath one of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

OWN = r"""
# A copy of somebody's mount would keep its server waiting after he has unmounted it, which he may do in this moment, too.
grep ' - fuse.iohang' /proc/self/mountinfo | cut -d' ' -f5 | while IFS= read -r at; do
    umount -l "$(printf %b "$at")" 2>/dev/null || true
done
own() { # DIRECTORY...: what is beneath them of $KEPT (a path on each line) stays where it is
    local at path fd each needed
    for at; do
        needed=()
        while IFS= read -r path; do
            case $path/ in
                "$at/") echo "$at cannot be the test's own: its tree lies there; put it into a directory beneath"; exit 1 ;;
                "$at"/*) exec {fd}<"$path"; needed+=("$fd:$path") ;;
            esac
        done <<<"$KEPT"
        mount -t tmpfs tmpfs "$at"
        for each in "${needed[@]}"; do
            path=${each#*:} fd=${each%%:*}
            mkdir -p "$path"
            mount --no-canonicalize --rbind "/proc/self/fd/$fd" "$path"
            exec {fd}<&-
        done
    done
}
"""


def kept(*others: Path) -> dict[str, str]:
    """The environment that `OWN` needs: this tree, its virtual environment, and *others*."""
    paths = [Path(__file__).parents[2], Path(sys.prefix), *others]
    return {"KEPT": "\n".join(str(path.resolve()) for path in paths)}
