"""The configuration: what the words of a user amount to, and what a wrong one is told."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from iohang_fuse import config
from iohang_fuse.config import Config, ConfigError, load

DESIGN_ERRORS = (
    "EIO ETIMEDOUT ESTALE ENOTCONN ECONNRESET ECONNREFUSED ECONNABORTED ENETDOWN ENETUNREACH EHOSTDOWN"
    " EHOSTUNREACH EREMOTEIO ENOLINK"
)


def settings(*options: str, file: Path | str | None = None) -> Config:
    return load("/srv/vm", "/mnt/iohang", options, file=None if file is None else str(file))


def problems(*options: str, file: Path | str | None = None, source: str = "/srv/vm") -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(source, "/mnt/iohang", options, file=None if file is None else str(file))
    return caught.value.problems


def problem(*options: str, file: Path | str | None = None) -> str:
    (only,) = problems(*options, file=file)
    return only


@pytest.fixture
def yaml(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "iohang.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# ---- the defaults, and one key at a time


def test_defaults_are_those_of_the_interface() -> None:
    """Without options: 60 s for each kind, tried every 5 s, gate 4, 1 GiB held, 4096 in flight, EIO, auto."""
    found = settings()
    assert (found.read_timeout_s, found.write_timeout_s, found.fsync_timeout_s) == (60, 60, 60)
    assert (found.interval_s, found.blocked_after_s, found.attr_timeout_s) == (5, 5, 1)
    assert (found.recovery_gate, found.max_background, found.held_limit_bytes) == (4, 4096, 1 << 30)
    assert found.errors == {getattr(errno, name) for name in DESIGN_ERRORS.split()}
    assert (found.timeout_errno, found.direct, found.log, found.mount_words) == (errno.EIO, "auto", None, ())
    assert (str(found.source), str(found.mountpoint), found.read_only) == ("/srv/vm", "/mnt/iohang", False)


def test_a_config_never_changes() -> None:
    """A Config is frozen: what was checked at the start stays true."""
    with pytest.raises(ValueError, match="frozen"):
        settings().interval_s = 1.0


def test_timeout_is_the_default_of_each_kind() -> None:
    """`timeout` counts for each kind that has no timeout of its own, wherever either stands."""
    found = settings("read_timeout=2h,timeout=90,fsync_timeout=inf")
    assert (found.read_timeout_s, found.write_timeout_s, found.fsync_timeout_s) == (7200, 90, math.inf)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("60", 60),
        ("0", 0),
        ("90s", 90),
        ("500ms", 0.5),
        ("1100ms", 1.1),
        ("5min", 300),
        ("2h", 7200),
        ("1d", 86400),
    ],
)
def test_spans(written: str, seconds: float) -> None:
    """A span is a number of seconds, or has one of the units ms, s, min, h, d."""
    assert settings(f"timeout={written}").write_timeout_s == seconds


@pytest.mark.parametrize("written", ["-1", "nan", "true", "5m", "5 s", "1e3", "0x10", "1_0", "5s\n", "٣", "infinity"])
def test_what_is_no_span(written: str) -> None:
    """Negative, not-a-number, boolean, and ambiguous spans are refused, with the forms that are right."""
    assert problem(f"timeout={written}") == (
        f"option timeout: {written!r} is no span of time; say 90 (seconds), 90s, 500ms, 5min, 2h, 1d or inf"
    )


def test_enough_digits_are_not_infinity() -> None:
    """A span beyond ten years is refused, so that a typing error does not become `inf`."""
    assert "more than ten years" in problem(f"timeout={'9' * 400}")
    assert len(problem(f"timeout={'9' * 400}")) < 200
    assert settings("timeout=3650d").read_timeout_s == 3650 * 86400


@pytest.mark.parametrize(
    ("option", "right"),
    [
        ("interval=0.09", "100ms to 1d"),
        ("interval=inf", "100ms to 1d"),
        ("blocked_after=0", "1ms or more"),
        ("attr_timeout=inf", "3650d at most"),
        ("wait_source=inf", "3650d at most"),
        ("recovery_gate=0", "a whole number from 1 to 1000"),
        ("recovery_gate=1001", "a whole number from 1 to 1000"),
        ("recovery_gate=4.0", "a whole number from 1 to 1000"),
        ("max_background=65536", "a whole number from 1 to 65535"),
        ("direct=always", "auto or never"),
        ("timeout_errno=EDQUOT", "EIO or ENOSPC"),
        ("held_limit=1.5G", "bytes, or 512K, 64M, 1G, 2T (binary multiples)"),
        ("held_limit=1\u212a", "bytes, or 512K, 64M, 1G, 2T (binary multiples)"),  # the Kelvin sign
        ("held_limit=64MB", "bytes, or 512K, 64M, 1G, 2T (binary multiples)"),
    ],
)
def test_limits(option: str, right: str) -> None:
    """Each limit is checked, and the message names the key, the value, and what would be right."""
    key, value = option.split("=")
    assert problem(option).startswith(f"option {key}: '{value}' is ")
    assert problem(option).endswith(f"; say {right}")


def test_sizes_are_binary_multiples() -> None:
    """`64M` is 64 MiB, and a bare number is bytes."""
    assert settings("held_limit=64M").held_limit_bytes == 64 << 20
    assert settings("held_limit=1g").held_limit_bytes == 1 << 30
    assert settings("held_limit=4096").held_limit_bytes == 4096
    assert "'0' would hold nothing" in problem("held_limit=0")


def test_errors_are_named(yaml) -> None:
    """`errors` replaces the list; names are joined by ':', or a list in the file."""
    assert settings("errors=EIO:ETIMEDOUT:enospc").errors == {errno.EIO, errno.ETIMEDOUT, errno.ENOSPC}
    assert settings(file=yaml("errors: [EIO, EDQUOT]")).errors == {errno.EIO, errno.EDQUOT}
    assert settings(file=yaml("errors: EIO:EDQUOT")).errors == {errno.EIO, errno.EDQUOT}
    assert "the nearest is 'ETIMEDOUT'" in problem("errors=EIO:ETIMDOUT")
    assert "names no error" in problem(file=yaml("errors: []"))


@pytest.mark.parametrize("name", ["EINVAL", "EBADF", "EACCES", "EPERM", "EROFS", "EFBIG"])
def test_some_errors_are_never_transient(name: str) -> None:
    """EINVAL, EBADF, EACCES, EPERM, EROFS and EFBIG are refused: holding them would hide a mistake."""
    assert "never transient" in problem(f"errors=EIO:{name}")


@pytest.mark.parametrize("name", ["EINTR", "EAGAIN"])
def test_some_errors_are_retried_at_once(name: str) -> None:
    """EINTR and EAGAIN are tried again at once, and so cannot be held."""
    assert "always retried at once" in problem(f"errors={name}")


def test_timeout_errno() -> None:
    """`timeout_errno` is EIO or ENOSPC, as a number."""
    assert settings("timeout_errno=ENOSPC").timeout_errno == errno.ENOSPC
    assert settings("timeout_errno=EIO").timeout_errno == errno.EIO


# ---- paths


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SOURCE, MOUNTPOINT and the log are absolute, because the server works in `/`; they need not exist."""
    monkeypatch.chdir(tmp_path)
    found = load("vm", "mnt/", ["log=my.log"])
    assert (found.source, found.mountpoint, found.log) == (
        tmp_path / "vm",
        tmp_path / "mnt",
        tmp_path / "my.log",
    )


def test_dots_beyond_a_link_are_the_file_systems(tmp_path: Path) -> None:
    """`link/..` is the parent of where the link leads, as everywhere."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    assert load(f"{tmp_path}/link/../vm", "/mnt").source == tmp_path / "far" / "vm"


def test_paths_that_a_mount_table_cannot_hold() -> None:
    """A newline or NUL in a path is refused, and told on one line."""
    assert problems(source="/a\nb") == ("SOURCE: '/a\\nb' has a newline or NUL in it; say a path without",)
    assert "SOURCE: " in problems(source="/a\0b")[0]
    assert "SOURCE: " in problems(source="")[0]
    assert "option log: " in problem("log=/a\nb")


def test_a_path_that_is_no_utf8_stays_as_it_is() -> None:
    """File names are bytes: what is not UTF-8 is kept."""
    assert os.fsencode(load(os.fsdecode(b"/srv/\xff"), "/mnt").source) == b"/srv/\xff"


def test_a_mount_point_is_neither_opened_nor_listed(tmp_path: Path) -> None:
    """SOURCE may hang, and MOUNTPOINT be an automount: neither is opened, listed, or asked for attributes."""
    with pytest.MonkeyPatch.context() as patch:
        for forbidden in ("open", "stat", "listdir", "scandir"):
            patch.setattr(os, forbidden, lambda *_, **__: pytest.fail("touched it"))
        assert load("/srv/vm", str(tmp_path)).mountpoint == tmp_path


def test_drop_privileges_is_refused() -> None:
    """mount.fuse3's `drop_privileges` shows in MOUNTPOINT; the server could not act as its callers then."""
    with pytest.raises(ConfigError, match="MOUNTPOINT: '/dev/fd/3' comes from drop_privileges"):
        load("/srv/vm", "/dev/fd/3")


# ---- mount words


def test_words_for_libfuse_are_passed_on() -> None:
    """What libfuse and the kernel understand is handed to them, in order."""
    words = "rw,nosuid,nodev,noexec,sync,noatime,dirsync,allow_other,default_permissions,context=a:b"
    assert settings(words).mount_words == tuple(words.split(","))


def test_the_last_of_two_opposite_words_wins() -> None:
    """`ro,rw` is `rw` and `rw,ro` is `ro`, whatever order libfuse looks at them in."""
    assert settings("ro,rw").mount_words == ("rw",)
    assert not settings("ro,rw").read_only
    assert settings("rw", "ro").mount_words == ("ro",)
    assert settings("rw", "ro").read_only
    assert settings("nosuid,suid,dev,nodev,context=a,context=b").mount_words == ("suid", "nodev", "context=b")


def test_atime_only_undoes_noatime() -> None:
    """`atime` undoes `noatime`, and is not handed on: it is the default, and libfuse 3.15 refuses it."""
    assert settings("noatime,atime").mount_words == ()
    assert settings("atime,noatime").mount_words == ("noatime",)


def test_words_for_others_are_dropped() -> None:
    """What mount(8) and systemd read in fstab, and what libfuse would refuse without need, is dropped."""
    words = (
        "defaults,_netdev,nofail,auto,noauto,user,nouser,users,owner,group,user=joe,comment=x,uhelper=x,helper=x,"
        "x-systemd.requires-mounts-for=/srv/vm,X-mount.mkdir=0755,relatime,norelatime,strictatime,nostrictatime,"
        "lazytime,nolazytime,diratime,nodiratime,iversion,noiversion,,"
    )
    assert settings(words) == settings()


@pytest.mark.parametrize(
    "word",
    [
        *("auto_unmount", "max_read=4096", "subtype=x", "nonempty", "allow_root", "fd=3", "rootmode=40000"),
        *("blksize=512", "kernel_cache", "auto_cache", "direct_io", "umask=022", "uid=0", "entry_timeout=1"),
        *("nosymfollow", "loop", "setuid=joe", "drop_privileges"),
    ],
)
def test_words_that_would_do_harm_are_refused_with_the_reason(word: str) -> None:
    """A word that libfuse knows but that must not be used here is refused, with the reason and what to do."""
    name = word.partition("=")[0]
    assert problem(word) == f"option {name}: {config.REFUSED[name]}"
    assert ";" in problem(word)


def test_remount_is_a_mount_failure() -> None:
    """`remount` ends in mount(8)'s exit code 32, and says what to do; other problems end in 1."""
    with pytest.raises(ConfigError, match="cannot be remounted; unmount and mount again") as caught:
        settings("remount,ro")
    assert caught.value.exit_code == 32
    with pytest.raises(ConfigError) as caught:
        settings("auto_unmount")
    assert caught.value.exit_code == 1


def test_fsname_may_say_what_is_true() -> None:
    """`fsname` equal to SOURCE is accepted, because the server sets the same; any other is refused."""
    assert settings("fsname=/srv/vm/") == settings()
    assert problem("fsname=/srv") == "option fsname: '/srv' is not SOURCE; leave it out"


def test_quotes_and_backslashes_protect_commas() -> None:
    """As in mount(8), a comma in double quotes or after a backslash does not end a word."""
    assert str(settings('log="/var/log/a,b",ro').log) == "/var/log/a,b"
    assert str(settings(r"log=/var/log/a\,b\"c,ro").log) == '/var/log/a,b"c'
    assert "never closed" in problem('log="/var/log/a,ro')


def test_a_quoted_context_reaches_the_kernel_quoted() -> None:
    """A SELinux context with a comma keeps its quotes for the kernel; its comma is escaped for libfuse."""
    assert settings('context="u:r:t:s0:c1,c2",ro').mount_words == ('context="u:r:t:s0:c1\\054c2"', "ro")
    assert settings('context="u:r:t:s0"').mount_words == ("context=u:r:t:s0",)


def test_escaping_for_libfuse() -> None:
    r"""Commas, backslashes and non-ASCII bytes become `\ooo`, which libfuse's option parser undoes."""
    assert config.libfuse_escaped("fsname=/srv/a,b") == r"fsname=/srv/a\054b"
    assert config.libfuse_escaped("fsname=/ä\\") == r"fsname=/\303\244\134"
    assert config.libfuse_escaped(os.fsdecode(b"/\xff")) == r"/\377"


# ---- what is unknown, missing or too much


def test_an_unknown_word_names_its_nearest_neighbour() -> None:
    """A typing error is told with the word that was probably meant."""
    assert problem("timeot=5") == "option 'timeot' is unknown; the nearest is 'timeout'"
    assert problem("nosiud") == "option 'nosiud' is unknown; the nearest is 'nosuid'"
    assert problem("qqqq") == "option 'qqqq' is unknown; see iohang-mount --help"


def test_sloppy_only_warns_of_unknown_words() -> None:
    """With mount(8)'s `-s` an unknown word is dropped with a warning; a wrong value stays an error."""
    said: list[str] = []
    load("/srv/vm", "/mnt", ["timeot=5"], sloppy=True, warn=said.append)
    assert said == ["option 'timeot' is unknown, and ignored"]
    with pytest.raises(ConfigError):
        load("/srv/vm", "/mnt", ["timeout=x"], sloppy=True)


def test_values_where_they_belong() -> None:
    """A key without its value is an error, and so is a flag with one."""
    assert problem("timeout") == "option timeout needs a value; say timeout=VALUE"
    assert problem("context=") == "option context needs a value; say context=VALUE"
    assert problem("ro=1") == "option ro takes no value; say ro alone"


def test_the_last_option_wins() -> None:
    """Of an option that is given several times the last one counts, as in mount(8)."""
    assert settings("interval=1,interval=2", "interval=3").interval_s == 3


def test_all_problems_at_once(yaml) -> None:
    """Whoever mends one line finds no second one behind it: every problem is told, each with its key."""
    path = yaml("interval: soon\ntimeot: 5\n")
    found = problems(
        f"config={path},remount,timeout=-1,direct=x,recovery_gate=0,wat,errors=EPERM,engine=fast", source=""
    )
    keys = [
        "SOURCE",
        "interval",
        "timeot",
        "remount",
        "timeout",
        "direct",
        "recovery_gate",
        "wat",
        "errors",
        "engine",
    ]
    assert len(found) == len(keys)
    assert all(any(key in line.split(" is ")[0].split(": '")[0] for line in found) for key in keys)
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    ("said", "where"),
    [
        ("none", None),
        ("127.0.0.1:9811", ("127.0.0.1", 9811)),
        ("localhost:1", ("localhost", 1)),
        ("metrics-1.example.org:65535", ("metrics-1.example.org", 65535)),
        ("[::1]:9811", ("::1", 9811)),
        ("192.0.2.1:9811", ("192.0.2.1", 9811)),
        ("/var/lib/prometheus/node-exporter/iohang.prom", Path("/var/lib/prometheus/node-exporter/iohang.prom")),
    ],
)
def test_metrics(said: str, where: object, yaml) -> None:
    """Design: "`metrics` | `none` | `HOST:PORT` for Prometheus"; or a file for node_exporter, which reads `*.prom`."""
    assert settings(f"metrics={said}").metrics_where == where
    assert settings(file=yaml(f"metrics: '{said}'\n")).metrics_where == where
    assert settings().metrics_where is None


@pytest.mark.parametrize(
    "said",
    ["9811", ":9811", "host", "host:", "host:0", "host:65536", "host:http", "::1:9811", "[::1]", "[host]:1", "ho st:1", "-a:1",
     "*:9811", "iohang.prom", "http://localhost:9811", "localhost:9811/metrics", "yes", "None"],
)  # fmt: skip
def test_wrong_metrics(said: str) -> None:
    """Bad input gets one line that says what would be right: a port alone does not say who may ask."""
    found = problem(f"metrics={said}")
    assert found.startswith(
        f"option metrics: '{said}' is neither HOST:PORT nor a file; say 127.0.0.1:9811 for this host alone"
    )


def test_a_file_of_metrics_has_the_name_that_node_exporter_reads() -> None:
    """node_exporter's textfile collector reads `*.prom`, and nothing else."""
    assert problem("metrics=/run/iohang.txt").endswith(
        "does not end in .prom, as node_exporter wants it; say /run/iohang.txt.prom"
    )


def test_monitor() -> None:
    """Design: `/run/iohang/<mount point, '/' as '-'>.sock`; a path of one's own, or none."""
    assert str(config.socket_of(Path("/mnt/iohang/a"))) == "/run/iohang/mnt-iohang-a.sock"
    assert str(config.socket_of(Path("/"))) == "/run/iohang/root.sock"
    assert settings().monitor_path == config.socket_of(settings().mountpoint)
    assert settings("monitor=none").monitor_path is None
    assert str(settings("monitor=/run/x.sock").monitor_path) == "/run/x.sock"
    assert "longer than a socket's name may be (107 bytes)" in problem(f"monitor=/run/{'x' * 103}")
    assert settings("monitor_group=root").monitor_group == "root"
    assert "'nobody-has-this' is no group here" in problem("monitor_group=nobody-has-this")


def test_write_log() -> None:
    """At least FUSE's largest write, or one could never be let in; a size, as any other."""
    assert settings().write_log_bytes == 64 << 20
    assert settings("write_log=1M").write_log_bytes == 1 << 20
    for wrong in ("0", "1023K", "4096"):
        assert problem(f"write_log={wrong}") == (
            f"option write_log: '{wrong}' is less than one large write; say 1M or more"
        )
    assert "is no size" in problem("write_log=many")


# ---- the file


def test_options_win_over_the_file(yaml) -> None:
    """The file gives the settings, the command line changes them, key by key."""
    path = yaml("# all images\ntimeout: 5min\ninterval: 1\nlog: /var/log/iohang.log\n")
    found = settings(f"config={path},interval=2")
    assert (found.write_timeout_s, found.interval_s, str(found.log)) == (300, 2, "/var/log/iohang.log")


@pytest.mark.parametrize(
    ("written", "seconds"), [("010", 10), ("1.5", 1.5), ("'90s'", 90), ("inf", math.inf), (".inf", math.inf)]
)
def test_numbers_in_the_file_are_what_they_look_like(yaml, written: str, seconds: float) -> None:
    """A text means the same in the file as in an option; YAML 1.1 would make 8 of `010`."""
    assert settings(file=yaml(f"timeout: {written}")).read_timeout_s == seconds


@pytest.mark.parametrize(
    "written", ["1:30", "1_0", "true", "[1]", "{a: 1}", ".nan", "-1", "!!python/name:os.system", "!!bool {}"]
)
def test_values_in_the_file_that_are_no_span(yaml, written: str) -> None:
    """What is no span as an option is none in the file; booleans, lists and mappings are none either."""
    assert ":1: timeout: " in problem(file=yaml(f"timeout: {written}"))
    assert "is no span of time" in problem(file=yaml(f"timeout: {written}"))


def test_an_empty_file_changes_nothing(yaml) -> None:
    """A file of comments alone is valid: the example configuration is one."""
    assert settings(file=yaml("# nothing\n")) == settings()


def test_the_file_is_named_by_an_argument_or_an_option(yaml, tmp_path: Path) -> None:
    """`-c FILE` and `config=FILE` may agree; two different files are an error."""
    path = yaml("interval: 2")
    assert settings(f"config={path}", file=path).interval_s == 2
    assert "name different files" in problem(f"config={tmp_path}/other", file=path)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("interval: 1\ntimeot: 5\n", 2, "timeot is an unknown key; the nearest is 'timeout'"),
        ("a b: 5\n", 1, "'a b' is an unknown key; see iohang-mount --help"),
        (
            "interval: 1\n\ninterval: 2\n",
            3,
            "interval is given twice, first on line 1; leave one of them out",
        ),
        ("{interval: 1, interval: 2}", 1, "interval is given twice, first on line 1; leave one of them out"),
        ("ro: true\n", 1, "ro is a mount word; give it with -o, or in fstab"),
        ("config: /etc/x\n", 1, "config: a configuration file cannot name another; leave it out"),
        ("[a]: 1\n", 1, "'?' is an unknown key; see iohang-mount --help"),
        ("source: /srv\n", 1, "source is no option but an argument; leave it out"),
        ("mount_words: [ro]\n", 1, "mount_words is an unknown key; the nearest is 'monitor'"),
        ("\ntimeout:\n", 2, "timeout has no value; give it one, or leave it out"),
        ("timeout: ~\n", 1, "timeout has no value; give it one, or leave it out"),
        ("log: ''\n", 1, "log has no value; give it one, or leave it out"),
        ("log: no\n", 1, "log: False is no path; say an absolute one"),
        ("- timeout\n", 1, "no mapping; give lines of `key: value`"),
        ("just words\n", 1, "no mapping; give lines of `key: value`"),
        ("interval: 1\n\ttimeout: 2\n", 2, "indent with spaces"),
        ("interval: [1\ntimeout: 2\n", 2, "no YAML: "),
        ("a: 1\n---\nb: 2\n", 2, "no YAML: but found another document"),
        (b"interval: 1\ntimeout: \xff\n", 2, "no UTF-8; save it as UTF-8"),
        ("interval: 1\ntimeout: \x07\n", 2, "a control character; remove it"),
    ],
)
def test_what_is_wrong_with_the_file_is_told_with_its_line(yaml, text: str, line: int, what: str) -> None:
    """Each problem of the file is one line that begins with FILE:LINE and says what would be right."""
    path = yaml(text)
    only = problem(file=path)
    assert only.startswith(f"{path}:{line}: ")
    assert what in only


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing file, a directory or an endless one is one line, not a traceback."""
    assert problem(file=tmp_path / "none").startswith(f"{tmp_path}/none cannot be read: No such file or directory")
    assert "cannot be read: Is a directory" in problem(file=tmp_path)
    assert "larger than 1 MiB" in problem("config=/dev/zero")


def test_deep_nesting_and_recursion_are_problems_too(yaml) -> None:
    """Neither a thousand brackets nor an alias of itself brings the parser down."""
    assert "nested too deeply" in problem(file=yaml("a: " + "[" * 1000))
    assert "is no error's name" in problem(file=yaml("errors: &a [*a]"))


# ---- for all inputs


@given(st.integers(0, 3650 * 86400 * 1000))
def test_spans_round_trip(milliseconds: int) -> None:
    """A span says the same in milliseconds and in seconds, to the millisecond."""
    expected = milliseconds / 1000
    assert config.parse_span(f"{milliseconds}ms") == expected
    assert config.parse_span(f"{milliseconds // 1000}.{milliseconds % 1000:03}") == expected


@given(st.integers(0, 999_999), st.sampled_from(["", "K", "M", "G", "T"]))
def test_sizes_round_trip(number: int, unit: str) -> None:
    """A size is its number times the power of 1024 of its unit."""
    assert config.parse_size(f"{number}{unit}") == number * 1024 ** " KMGT".index(unit or " ")


def as_the_system_gives_it() -> st.SearchStrategy[str]:
    """Any argument: any bytes without NUL, as Python decodes them."""
    return st.binary(max_size=40).filter(lambda data: b"\0" not in data).map(os.fsdecode)


WORDS = sorted({*config.KEYS, *config.FLAGS, *config.CONTEXTS, "config", "fsname"})
OPTION = st.one_of(
    as_the_system_gives_it(),
    st.builds("{}={}".format, st.sampled_from(WORDS), st.one_of(as_the_system_gives_it(), st.text(max_size=20))),
)


def outcome(source: str, mountpoint: str, options: list[str], file: str | None = None) -> Config | ConfigError:
    try:
        return load(source, mountpoint, options, file=file)
    except ConfigError as error:
        return error


def is_well_told(error: ConfigError) -> bool:
    return bool(error.problems) and all(len(line.splitlines()) == 1 for line in error.problems)


@given(as_the_system_gives_it(), as_the_system_gives_it(), st.lists(OPTION, max_size=4))
@example("/a", "/b", ["timeout=" + "9" * 5000])
@example("/a", "/b", ["held_limit=" + "9" * 5000])
@example("\ud800", "/b", ["errors=ß"])
@example("/a", "/b", ["config=\ud800"])
def test_no_option_raises_anything_but_a_config_error(source: str, mountpoint: str, options: list[str]) -> None:
    """Whatever is given: a Config, or a ConfigError of single lines."""
    found = outcome(source, mountpoint, [option for option in options if "config=/" not in option])
    if isinstance(found, ConfigError):
        assert is_well_told(found)
    else:
        assert found.source.is_absolute()
        assert all(word.isascii() and "," not in word for word in found.mount_words)


YAML_VALUE = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            "~",
            "no",
            "!!int x",
            "!!bool {}",
            "!!null []",
            "1e400",
            "<<",
            "&a [*a]",
            "*a",
            "[[]]",
            "{a: {}}",
            "? ",
        ]
    ),
)


@given(
    st.lists(st.tuples(st.one_of(st.sampled_from(WORDS), YAML_VALUE), YAML_VALUE), max_size=4),
    st.one_of(st.just(b""), st.binary(max_size=20)),
)
def test_no_file_raises_anything_but_a_config_error(tmp_path_factory, pairs, tail: bytes) -> None:
    """Whatever the file holds: a Config, or a ConfigError of single lines."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes("\n".join(f"{key}: {value}" for key, value in pairs).encode() + b"\n" + tail)
    found = outcome("/srv", "/mnt", [], file=str(path))
    assert isinstance(found, Config) or is_well_told(found)
