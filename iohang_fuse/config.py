"""Configuration file and mount options -> one frozen `Config`, or one `ConfigError` with every problem.

1. Each option is declared once, as a field of `Config`: its default as a user would write it, its limits, its
   meaning. The key is the field's name without its unit: `held_limit_bytes` is `held_limit`.
2. A text means the same in the file as in a mount option. So the file's values are taken as they are written,
   not as YAML 1.1 reads them (which makes 8 of `010` and 90 of `1:30`).
3. Of a key that is given several times the last option wins, then the file; only what wins is checked.
4. This module does not know whether SOURCE and MOUNTPOINT exist, and never opens them: that may hang, or set
   off an automount. It reads the configuration file, and nothing else.
"""

from __future__ import annotations

import difflib
import errno
import grp
import math
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from iohang_fuse.mountwords import CONTEXTS, DROPPED, FLAGS, OPPOSITE, REFUSED, libfuse_escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

USAGE, MOUNT_FAILURE = 1, 32
"""mount(8)'s exit codes for wrong usage, and for a mount that failed."""

LONGEST_SPAN_S = 3650 * 86400
"""Ten years. A longer span is a typing error, and with enough digits it would silently be `inf`."""

LARGEST_WRITE_BYTES = 1 << 20
"""FUSE's largest request: FUSE_MAX_MAX_PAGES in the kernel."""

LARGEST_FILE_BYTES = 1 << 20
"""More than any configuration has; `config=/dev/zero` must not fill the memory."""

ERRNOS = {name: getattr(errno, name) for name in dir(errno) if name.startswith("E")}
NEVER_TRANSIENT = frozenset({"EINVAL", "EBADF", "EACCES", "EPERM", "EROFS", "EFBIG"})
RETRIED_AT_ONCE = frozenset({"EINTR", "EAGAIN", "EWOULDBLOCK"})


class ConfigError(Exception):
    """What is wrong with the configuration: one line for each problem, and mount(8)'s exit code."""

    def __init__(self, problems: Iterable[str], exit_code: int = USAGE) -> None:
        self.problems = tuple(dict.fromkeys(" ".join(problem.splitlines()) for problem in problems))
        self.exit_code = exit_code
        super().__init__("; ".join(self.problems))


# ---- one value: takes what was written; ValueError says what is wrong, and what would be right


def shown(value: object) -> str:
    """*value* as part of a message: quoted, on one line, no longer than is useful."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about the unknown *name*: the one of *known* that was probably meant, if any."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; the nearest is '{close[0]}'" if close else ""


def _text(value: object) -> str:
    """What the patterns below are matched with; no boolean, mapping or list matches any of them."""
    return str(value) if isinstance(value, str | int | float) else ""


def parse_span(value: object) -> float:
    """Seconds from a number or from `90s`, `500ms`, `5min`, `2h`, `1d`, `inf`; ValueError otherwise."""
    text = _text(value)
    if text in {"inf", ".inf"}:
        return math.inf
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ms|s|min|h|d|)", text)
    if match is None:
        raise ValueError(f"{shown(value)} is no span of time; say 90 (seconds), 90s, 500ms, 5min, 2h, 1d or inf")
    unit_s = {"ms": "0.001", "s": "1", "": "1", "min": "60", "h": "3600", "d": "86400"}[match[2]]
    seconds = Decimal(match[1]) * Decimal(unit_s)
    if seconds > LONGEST_SPAN_S:
        raise ValueError(f"{shown(value)} is more than ten years; say 3650d at most, or inf")
    return float(seconds)


def parse_size(value: object) -> int:
    """Bytes from a number or from `512K`, `64M`, `1G`, `2T` (binary multiples); ValueError otherwise."""
    match = re.fullmatch(r"([0-9]{1,18})([KMGTkmgt]?)", _text(value))
    if match is None:
        raise ValueError(f"{shown(value)} is no size; say bytes, or 512K, 64M, 1G, 2T (binary multiples)")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def parse_path(value: object) -> Path:
    """An absolute path; ValueError if *value* is none, or cannot stand in a mount table."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{shown(value)} is no path; say an absolute one")
    text = str(value)
    if "\n" in text or "\0" in text:
        raise ValueError(f"{shown(value)} has a newline or NUL in it; say a path without")
    os.fsencode(text)
    try:
        # Beyond a link, `..` is not the parent that the text shows. Reading links opens and lists nothing.
        return Path(os.path.realpath(text)) if ".." in Path(text).parts else Path(text).absolute()
    except OSError as error:
        raise ValueError(f"{shown(value)}: no current directory ({error.strerror}); say an absolute path") from error


def parse_errnos(value: object) -> frozenset[int]:
    """Numbers from `EIO:ETIMEDOUT` or a list of such names; ValueError for what can never be transient."""
    names = value.split(":") if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise ValueError(f"{shown(value)} names no error; say EIO:ETIMEDOUT (timeout=0 turns holding off)")
    numbers = set()
    for given in names:
        name = _text(given).upper()
        if name not in ERRNOS:
            raise ValueError(f"{shown(given)} is no error's name{nearest(name, ERRNOS) or '; see errno(3)'}")
        if name in NEVER_TRANSIENT:
            raise ValueError(f"{name} is never transient: the same request would always fail so; leave it out")
        if name in RETRIED_AT_ONCE:
            raise ValueError(f"{name} is always retried at once, and so never held; leave it out")
        numbers.add(ERRNOS[name])
    return frozenset(numbers)


def _mountpoint(value: object) -> Path:
    path = parse_path(value)
    if re.fullmatch(r"/dev/fd/[0-9]+", str(path)):
        raise ValueError(f"{shown(value)} comes from drop_privileges, {REFUSED['drop_privileges']}")
    return path


def _span(said: str, least_s: float, most_s: float = math.inf) -> Callable[[object], float]:
    def parse(value: object) -> float:
        seconds = parse_span(value)
        if not least_s <= seconds <= most_s:
            raise ValueError(f"{shown(value)} is out of range; say {said}")
        return seconds

    return parse


def _integer(least: int, most: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", _text(value)) or not least <= int(_text(value)) <= most:
            raise ValueError(f"{shown(value)} is out of range; say a whole number from {least} to {most}")
        return int(_text(value))

    return parse


def _choice(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if _text(value) not in choices:
            raise ValueError(f"{shown(value)} is not one of the choices; say {' or '.join(choices)}")
        return _text(value)

    return parse


def _timeout_errno(value: object) -> int:
    return errno.ENOSPC if _choice("EIO", "ENOSPC")(value) == "ENOSPC" else errno.EIO


def _held_limit(value: object) -> int:
    size = parse_size(value)
    if size == 0:
        raise ValueError(f"{shown(value)} would hold nothing; say 1G, or timeout=0 to turn holding off")
    return size


def _write_log(value: object) -> int:
    size = parse_size(value)
    if size < LARGEST_WRITE_BYTES:
        raise ValueError(f"{shown(value)} is less than one large write; say 1M or more")
    return size


RUN = Path("/run/iohang")
MONITOR = f"{RUN}/MOUNTPOINT.sock"
"""What stands for the default: the mount point without its first `/`, and with `-` for each other one."""

LONGEST_SOCKET = 107  # unix(7): sun_path, and a NUL


def socket_of(mountpoint: Path) -> Path:
    """The default socket of the monitor of a mount there."""
    return RUN / f"{str(mountpoint).strip('/').replace('/', '-') or 'root'}.sock"


def _monitor(value: object) -> str:
    if _text(value) in {"none", MONITOR}:
        return _text(value)
    path = str(parse_path(value))
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise ValueError(
            f"{shown(value)} is longer than a socket's name may be ({LONGEST_SOCKET} bytes); say a shorter path"
        )
    return path


def _metrics(value: object) -> str:
    text = _text(value)
    if text == "none":
        return text
    if text.startswith("/"):
        path = parse_path(text)
        if path.suffix != ".prom":
            raise ValueError(f"{shown(value)} does not end in .prom, as node_exporter wants it; say {path}.prom")
        return str(path)
    if not _host_and_port(text):
        raise ValueError(
            f"{shown(value)} is neither HOST:PORT nor a file; say 127.0.0.1:9811 for this host alone (0.0.0.0:9811 or [::]:9811 "
            "for all), or an absolute path that ends in .prom, or none"
        )
    return text


def _host_and_port(text: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)):([0-9]{1,5})", text)
    return (match[1] or match[2], int(match[3])) if match and 0 < int(match[3]) < 65536 else None


def _group(value: object) -> str:
    name = _text(value)
    try:
        grp.getgrnam(name)
    except (KeyError, ValueError):
        raise ValueError(f"{shown(value)} is no group here; say one of getent(1) group") from None
    return name


# ---- all values

TIMEOUT = "60"
TIMEOUT_KINDS = ("read_timeout", "write_timeout", "fsync_timeout")
TRANSIENT = (
    "EIO:ETIMEDOUT:ESTALE:ENOTCONN:ECONNRESET:ECONNREFUSED:ECONNABORTED:"
    "ENETDOWN:ENETUNREACH:EHOSTDOWN:EHOSTUNREACH:EREMOTEIO:ENOLINK"
)

_Timeout = Annotated[float, PlainValidator(parse_span)]


def _option(default: str, meaning: str) -> Any:
    return Field(default, description=meaning)


class Config(BaseModel):
    """What one mount is to do. Times in seconds (`math.inf` is allowed), sizes in bytes, errno as numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        populate_by_name=True,
        alias_generator=lambda name: name.removesuffix("_s").removesuffix("_bytes"),
    )

    source: Annotated[Path, PlainValidator(parse_path)]
    mountpoint: Annotated[Path, PlainValidator(_mountpoint)]
    read_timeout_s: _Timeout = _option(TIMEOUT, "the same for reads")
    write_timeout_s: _Timeout = _option(TIMEOUT, "the same for writes")
    fsync_timeout_s: _Timeout = _option(TIMEOUT, "the same for fsyncs")
    interval_s: Annotated[float, PlainValidator(_span("100ms to 1d", 0.1, 86400))] = _option(
        "5", "between attempts; 100ms at least"
    )
    errors: Annotated[frozenset[int], PlainValidator(parse_errnos)] = _option(
        TRANSIENT, "the errors that are transient, joined by ':'"
    )
    timeout_errno: Annotated[int, PlainValidator(_timeout_errno)] = _option(
        "EIO", "the answer after the timeout; at ENOSPC, QEMU pauses the guest"
    )
    recovery_gate: Annotated[int, PlainValidator(_integer(1, 1000))] = _option(
        "4", "attempts in flight per hanging image"
    )
    blocked_after_s: Annotated[float, PlainValidator(_span("1ms or more", 0.001))] = _option(
        "5", "when an attempt that has not returned counts as a hang"
    )
    held_limit_bytes: Annotated[int, PlainValidator(_held_limit)] = _option(
        "1G", "data held in all; beyond it new failures are passed on"
    )
    write_log_bytes: Annotated[int, PlainValidator(_write_log)] = _option(
        "64M",
        "acknowledged, not yet stable data per image; beyond it writers wait",
    )
    max_background: Annotated[int, PlainValidator(_integer(1, 65535))] = _option(
        "4096", "requests in flight that the kernel allows for this mount"
    )
    engine: Annotated[Literal["auto", "uring", "threads"], PlainValidator(_choice("auto", "uring", "threads"))] = (
        _option("auto", "how data I/O is done: io_uring where it can be had, or threads")
    )
    direct: Annotated[Literal["auto", "never"], PlainValidator(_choice("auto", "never"))] = _option(
        "auto", "past the page cache where SOURCE takes that unaligned (NFS); or never"
    )
    reconnect: Annotated[Literal["auto", "never"], PlainValidator(_choice("auto", "never"))] = _option(
        "auto", "in an outage of NFS, close connections that hear nothing; or never"
    )
    attr_timeout_s: Annotated[float, PlainValidator(_span("3650d at most", 0, LONGEST_SPAN_S))] = _option(
        "1", "how long the kernel may cache names and attributes"
    )
    wait_source_s: Annotated[float, PlainValidator(_span("3650d at most", 0, LONGEST_SPAN_S))] = _option(
        "0", "at the start: how long to wait until SOURCE is there, and mounted"
    )
    monitor: Annotated[str, PlainValidator(_monitor)] = _option(
        MONITOR, "the monitor's QMP socket; none for no monitor"
    )
    monitor_group: Annotated[str, PlainValidator(_group)] = _option(
        "root", "who beside root may use the monitor: a group's name"
    )
    metrics: Annotated[str, PlainValidator(_metrics)] = _option(
        "none", "for Prometheus: HOST:PORT, or a file that ends in .prom"
    )
    log: Annotated[Path | None, PlainValidator(parse_path)] = Field(
        None, validate_default=False, description="a file, in place of stderr or (in the background) the journal"
    )
    log_level: Annotated[str, PlainValidator(_choice("debug", "info", "warning"))] = _option(
        "info", "debug logs each retry, too; warning only hangs and errors"
    )
    mount_words: tuple[str, ...] = ()
    """For pyfuse3.init(), escaped as libfuse wants them (`libfuse_escaped`); none contradicts another."""

    @property
    def monitor_path(self) -> Path | None:
        """The monitor's socket; None if there is to be none."""
        if self.monitor == MONITOR:
            return socket_of(self.mountpoint)
        return None if self.monitor == "none" else Path(self.monitor)

    @property
    def metrics_where(self) -> tuple[str, int] | Path | None:
        """Host and port, or a file; None if there are to be none."""
        if self.metrics == "none":
            return None
        return _host_and_port(self.metrics) or Path(self.metrics)

    @property
    def read_only(self) -> bool:
        """Whether the mount is `ro`."""
        return "ro" in self.mount_words


KEYS = frozenset({"timeout"} | {str(each.alias) for each in Config.model_fields.values() if each.description})
"""The options that this version has."""


def option_table() -> list[tuple[str, str, str]]:
    """Key, default as a user writes it, and meaning, of each option that this version has."""
    table = [("timeout", TIMEOUT, "how long a request is held after its first failure; 0 is off; inf")]
    for field in Config.model_fields.values():
        if field.description:
            default = "timeout" if field.alias in TIMEOUT_KINDS else str(field.default or "")
            table.append((str(field.alias), default, field.description))
    return [*table, ("config", "", "a YAML file with the same keys; options win over it")]


# ---- reading


@dataclass(frozen=True, slots=True)
class _Setting:
    where: str  # what messages call it: "option timeout", "/etc/iohang.yaml:3: timeout"
    value: object


def split_options(options: str) -> list[str]:
    r"""The words of `a,b="x,y",c=1\,2`, split as mount(8) does: quotes or `\` protect commas; ConfigError."""
    words, quoted, before = [""], False, ""
    for char in options:
        quoted ^= char == '"' and before != "\\"
        if char == "," and not quoted and before != "\\":
            words.append("")
        else:
            words[-1] += char
        before = char
    if quoted:
        raise ConfigError([f"option {shown(words[-1])}: the double quote is never closed; close it"])
    return [word for word in words if word]


class _Options:
    """What all `-o` say together, and what is wrong with them."""

    def __init__(self, options: Iterable[str], warn: Callable[[str], None] | None) -> None:
        self.settings: dict[str, _Setting] = {}
        self.words: dict[str, str] = {}  # by name: the last one of a name, or of a pair of opposites, wins
        self.problems: list[str] = []
        self.exit_code = USAGE
        self._warn = warn  # unknown words are warned of, or are problems
        for each in options:
            try:
                for word in split_options(each):
                    name, equals, value = word.partition("=")
                    self._take(name, re.sub(r'\\([",])|"', r"\1", value) if equals else None)
            except ConfigError as error:
                self.problems += error.problems
        if (
            self.exit_code == MOUNT_FAILURE
        ):  # a remount: mount(8) adds what the mount has by now, which is nobody's mistake
            added = {f"option {name}: {REFUSED[name]}" for name in ("user_id", "group_id")}
            self.problems = [problem for problem in self.problems if problem not in added]

    @property
    def mount_words(self) -> tuple[str, ...]:
        # An `atime` has undone its `noatime`, and has no more to say; libfuse refuses it from 3.15 on.
        return tuple(libfuse_escaped(word) for name, word in self.words.items() if name != "atime")

    def _take(self, name: str, value: str | None) -> None:
        if name in DROPPED or name.startswith(("x-", "X-")):
            return
        if name in REFUSED:
            self.problems.append(f"option {name}: {REFUSED[name]}")
            self.exit_code = MOUNT_FAILURE if name == "remount" else self.exit_code
        elif name in FLAGS:
            if value is not None:
                self.problems.append(f"option {name} takes no value; say {name} alone")
            for undone in {name, OPPOSITE.get(name, name)} & self.words.keys():
                del self.words[undone]
            self.words[name] = name
        elif name in {*KEYS, *CONTEXTS, "config", "fsname"}:
            self._take_value(name, value)
        elif self._warn:
            self._warn(f"option {shown(name)} is unknown, and ignored")
        else:
            near = nearest(name, {*KEYS, *FLAGS, *CONTEXTS, *DROPPED, "config"})
            self.problems.append(f"option {shown(name)} is unknown{near or '; see iohang-mount --help'}")

    def _take_value(self, name: str, value: str | None) -> None:
        if not value:
            self.problems.append(f"option {name} needs a value; say {name}=VALUE")
        elif name in CONTEXTS:
            # SELinux in the kernel splits at commas again, unless it sees quotes: selinux_sb_eat_lsm_opts().
            self.words[name] = f'{name}="{value}"' if "," in value else f"{name}={value}"
        else:
            self.settings[name] = _Setting(f"option {name}", value)


def _read_file(path: Path, problems: list[str]) -> dict[str, _Setting]:
    """The settings in the YAML file *path*; what is wrong with it goes to *problems*."""
    settings: dict[str, _Setting] = {}
    lines: dict[str, int] = {}
    for key, line, value in _pairs(path):
        where = f"{path}:{line}: {key}"
        if key in lines:
            problems.append(f"{where} is given twice, first on line {lines[key]}; leave one of them out")
        elif key == "config":
            problems.append(f"{where}: a configuration file cannot name another; leave it out")
        elif key in {*FLAGS, *CONTEXTS, *DROPPED, *REFUSED, "fsname"}:
            problems.append(f"{where} is a mount word; give it with -o, or in fstab")
        elif key in {"source", "mountpoint"}:
            problems.append(f"{where} is no option but an argument; leave it out")
        elif key not in KEYS:
            problems.append(f"{where} is an unknown key{nearest(key, KEYS) or '; see iohang-mount --help'}")
        elif value is None or value == "":
            problems.append(f"{where} has no value; give it one, or leave it out")
        else:
            settings[key] = _Setting(where, value)
        lines.setdefault(key, line)
    return settings


def _pairs(path: Path) -> list[tuple[str, int, object]]:
    """Key, line and value as written, of each entry of the YAML mapping in *path*; ConfigError if none."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
        if len(data) > LARGEST_FILE_BYTES:
            raise ConfigError([f"{path} is larger than 1 MiB; name a YAML file"])
        text = data.decode()
        node = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}; name a readable file"]) from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: no UTF-8; save it as UTF-8"]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError([f"{path}:{line}: a control character; remove it"]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        advice = "indent with spaces" if "\\t" in str(error.problem) else "give lines of `key: value`"
        raise ConfigError([f"{path}:{mark.line + 1 if mark else 1}: no YAML: {error.problem}; {advice}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path} is nested too deeply; give lines of `key: value`"]) from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{path}:{node.start_mark.line + 1}: no mapping; give lines of `key: value`"])
    pairs = []
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        name = name if re.fullmatch(r"[\w.-]+", name) else shown(name)
        pairs.append((name, key.start_mark.line + 1, _as_written(value)))
    return pairs


def _as_written(node: yaml.Node) -> object:
    """A scalar's text, or a list of such. None for null; a bool or {} for what no option takes."""
    if isinstance(node, yaml.SequenceNode):
        return [_as_written(each) if isinstance(each, yaml.ScalarNode) else {} for each in node.value]
    kind = node.tag.removeprefix("tag:yaml.org,2002:") if isinstance(node, yaml.ScalarNode) else ""
    if kind in {"str", "int", "float", "timestamp"}:
        return str(node.value)
    if kind == "bool":
        return node.value.lower() in {"yes", "true", "on"}
    return None if kind == "null" else {}


def load(
    source: str | Path,
    mountpoint: str | Path,
    options: Sequence[str] = (),
    *,
    file: str | None = None,
    sloppy: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> Config:
    """The `Config` of one mount; ConfigError with everything that is wrong.

    *options* are the arguments of all `-o`, in order; *file* names the configuration file, as `config=` does.
    With *sloppy* (mount(8)'s `-s`), unknown options are dropped, and *warn* gets a line for each.
    """
    read = _Options(options, warn if sloppy else None)
    problems = read.problems
    fsname = read.settings.pop("fsname", None)
    settings: dict[str, _Setting] = {}
    try:
        path = _file_named(file, read.settings.pop("config", None))
        settings = _read_file(path, problems) if path else {}
    except ConfigError as error:
        problems += error.problems
    settings |= read.settings
    if timeout := settings.pop("timeout", None):
        settings = dict.fromkeys(TIMEOUT_KINDS, timeout) | settings
    settings |= {"source": _Setting("SOURCE", source), "mountpoint": _Setting("MOUNTPOINT", mountpoint)}
    values = {key: setting.value for key, setting in settings.items()}
    try:
        config = Config.model_validate({**values, "mount_words": read.mount_words})
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            reason = each.get("ctx", {}).get("error", each["msg"])
            problems.append(f"{settings[str(each['loc'][0])].where}: {reason}")
        raise ConfigError(problems, read.exit_code) from None
    # The server sets it to SOURCE: without that, `mount -a` mounts twice. Whoever says the same is welcome.
    if fsname and Path(str(fsname.value)) not in {Path(source), config.source}:
        problems.append(f"option fsname: {shown(fsname.value)} is not SOURCE; leave it out")
    if problems:
        raise ConfigError(problems, read.exit_code)
    return config


def _file_named(argument: str | None, option: _Setting | None) -> Path | None:
    """The file that `-c` and the option `config` name together, if any."""
    paths = set()
    for named in (None if argument is None else _Setting("-c", argument), option):
        if named:
            try:
                paths.add(parse_path(named.value))
            except ValueError as error:
                raise ConfigError([f"{named.where}: {error}"]) from error
    if len(paths) > 1:
        raise ConfigError([f"-c and config= name different files: {' and '.join(map(str, paths))}; name one"])
    return paths.pop() if paths else None
