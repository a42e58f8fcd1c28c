"""iohang-mount and mount.iohang: arguments in, exit code out.

1. The same program under two names. As `mount.iohang` it is a helper of mount(8), whose `-f` means fake.
2. What is wrong is said on stderr, a line for each problem, and ends in mount(8)'s exit codes.
3. What the options mean is config.py's affair, and what is done with them is mount.py's.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from iohang_fuse import __version__, config, mountwords
from iohang_fuse.background import INTERRUPTED
from iohang_fuse.doctor.findings import UNKNOWN
from iohang_fuse.messages import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

HELPER = "mount.iohang"

AMOUNTS_TO = (
    "With the defaults, a read, write or fsync that fails with one of these errors is held for up to a minute,"
    " and tried again every five seconds. If SOURCE works again in time, the guest has seen a pause."
    " If not, it sees EIO; what fails after that is answered at once, until SOURCE works again."
)


class _Parser(argparse.ArgumentParser):
    """argparse with mount(8)'s exit code for wrong usage, and one line in place of a usage text."""

    def error(self, message: str) -> NoReturn:
        _say(f"{message}; see {self.prog} --help")
        sys.exit(config.USAGE)


def _say(line: str) -> None:
    sys.stderr.write(f"iohang-mount: {printable(' '.join(line.splitlines()))}\n")


def options_help() -> str:
    """The table of all options with their defaults, and what the defaults amount to."""
    rows = [
        f"  {key:<15} {default if len(default) < 9 else '(below)':<8} {meaning}"
        for key, default, meaning in config.option_table()
    ]
    paragraphs = [
        "Spans of time: seconds, or 500ms, 90s, 5min, 2h, 1d; timeouts also inf. Sizes: bytes, or 64M, 1G.",
        f"Errors, by default: {config.TRANSIENT.replace(':', ', ')}.",
        f"Also the words of mount(8) and FUSE: {', '.join(sorted({*mountwords.FLAGS, *mountwords.CONTEXTS}))}.",
        f"The monitor, by default: {config.MONITOR}, with the mount point's '/' as '-'; ask it with iohangctl(8).",
        AMOUNTS_TO,
        "Exit codes: 0 mounted, 1 wrong usage, 2 system error, 8 interrupted, 32 mount failure.",
    ]
    filled = [textwrap.fill(each, 100, break_on_hyphens=False) for each in paragraphs]
    return "\n".join(["options of -o, with their defaults:", *rows]) + "\n\n" + "\n\n".join(filled)


def _parser(*, helper: bool) -> _Parser:
    parser = _Parser(
        prog=HELPER if helper else "iohang-mount",
        description="Mirror SOURCE at MOUNTPOINT, and hold failed disk I/O until SOURCE works again.",
        epilog=options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="directory of disk images")
    add("mountpoint", metavar="MOUNTPOINT", help="where they are mirrored")
    add(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="OPTION[,OPTION...], see below",
    )
    add("-c", dest="file", metavar="FILE", help="the same as -o config=FILE")
    if helper:
        add("-f", dest="fake", action="store_true", help="fake: do everything but the mount")
    else:
        add("-f", "--foreground", action="store_true", help="stay in the foreground")
        add("--check", action="store_true", help="mount nothing; say what would go wrong in an outage")
        add("--json", action="store_true", help="with --check: for programs")
    add("-v", "--verbose", action="store_true", help="say more")
    add("-s", dest="sloppy", action="store_true", help="ignore unknown options, with a warning")
    add("-n", action="store_true", help="accepted, for mount(8)")
    add("-t", metavar="TYPE", help="accepted, for mount(8)")
    add("-N", dest="namespace", metavar="NAMESPACE", help="not supported")
    add("--version", action="version", version=f"iohang-mount {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Mount as *argv* says (without the program's name; this process's arguments by default).

    The exit code is mount(8)'s: of the parent once the mount serves, or of the server itself at its end.
    """
    helper = Path(sys.argv[0]).name == HELPER
    try:
        arguments = _parser(helper=helper).parse_args(argv)
    except SystemExit as done:  # argparse's way to end, after --help and --version, too
        words = sys.argv[1:] if argv is None else argv
        return UNKNOWN if done.code and "--check" in words and not helper else int(done.code or 0)
    checks = not helper and arguments.check
    if not helper and arguments.json and not checks:
        _say("--json is the form of what --check says; say --check --json")
        return config.USAGE
    if arguments.namespace is not None:
        _say("-N: other mount namespaces are not supported; enter it first, with nsenter --mount")
        return UNKNOWN if checks else config.USAGE
    try:
        settings = config.load(
            arguments.source,
            arguments.mountpoint,
            arguments.options,
            file=arguments.file,
            sloppy=arguments.sloppy,
            warn=lambda line: _say(f"warning: {line}"),
        )
    except config.ConfigError as error:
        for problem in error.problems:
            _say(problem)
        return UNKNOWN if checks else error.exit_code
    # Not before: neither --help nor a wrong option needs libfuse.
    if checks:
        from iohang_fuse.doctor.check import run as check  # noqa: PLC0415

        return check(settings, json_=arguments.json)
    return _mount(
        settings,
        foreground=not helper and arguments.foreground,
        fake=helper and arguments.fake,
        verbose=arguments.verbose,
    )


def _mount(settings: config.Config, *, foreground: bool, fake: bool, verbose: bool) -> int:
    try:
        from iohang_fuse.mount import run  # noqa: PLC0415

        return run(settings, foreground=foreground, fake=fake, verbose=verbose)
    except KeyboardInterrupt:
        _say("interrupted before the mount served")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
