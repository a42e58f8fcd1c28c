"""The command line: two names, mount(8)'s exit codes, and a line for each problem."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from iohang_fuse import cli, config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What mount.run() was called with; it answers 32, a code that nothing else here gives."""
    calls = []

    def run(settings: config.Config, **how: Any) -> int:
        calls.append(SimpleNamespace(config=settings, **how))
        return 32

    mount = ModuleType("iohang_fuse.mount")
    monkeypatch.setattr(mount, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "iohang_fuse.mount", mount)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/iohang-mount"])
    return calls


@pytest.fixture
def helper(runs: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The same, called as mount(8) calls its helpers."""
    monkeypatch.setattr(sys, "argv", ["/sbin/mount.iohang"])
    return runs


@pytest.mark.parametrize(
    "arguments",
    [
        "/srv/vm /mnt -f -o timeout=5,ro -o interval=1",
        "-o timeout=5,ro -f -o interval=1 /srv/vm /mnt",
        "/srv/vm --foreground -o timeout=5 /mnt -oro -o interval=1",
    ],
)
def test_options_stand_before_or_after_the_paths(arguments: str, runs: list[SimpleNamespace]) -> None:
    """Arguments come in any order; the mount gets the Config, and its exit code is the program's."""
    assert cli.main(arguments.split()) == 32
    (run,) = runs
    assert (str(run.config.source), str(run.config.mountpoint)) == ("/srv/vm", "/mnt")
    assert (run.config.read_timeout_s, run.config.interval_s, run.config.mount_words) == (5, 1, ("ro",))
    assert (run.foreground, run.fake, run.verbose) == (True, False, False)


def test_arguments_are_the_process_s_by_default(runs: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points call main() without arguments; then the background is the default."""
    monkeypatch.setattr(sys, "argv", ["iohang-mount", "/srv/vm", "/mnt", "-v"])
    assert cli.main() == 32
    assert (runs[0].foreground, runs[0].fake, runs[0].verbose) == (False, False, True)


def test_as_mount_fuse3_calls_it(runs: list[SimpleNamespace]) -> None:
    """`mount -t fuse.iohang-mount` gives `SRC MNT -o rw,...,dev,suid`."""
    assert cli.main(["/srv/vm", "/mnt", "-o", "rw,timeout=5min,nofail,dev,suid"]) == 32
    assert runs[0].config.mount_words == ("rw", "dev", "suid")
    assert not runs[0].foreground


def test_as_mount_calls_its_helper(helper: list[SimpleNamespace]) -> None:
    """As `mount.iohang`, `-f` is mount(8)'s fake, and `-n`, `-v` and `-t` are accepted."""
    assert cli.main(["/srv/vm", "/mnt", "-s", "-f", "-n", "-v", "-o", "rw,_netdev", "-t", "iohang"]) == 32
    assert (helper[0].foreground, helper[0].fake, helper[0].verbose) == (False, True, True)


def test_helper_drops_unknown_words_when_sloppy(helper: list[SimpleNamespace], capsys) -> None:
    """mount(8)'s `-s`: an unknown word is dropped with a warning; without it, it is an error."""
    assert cli.main(["/srv/vm", "/mnt", "-s", "-o", "rw,frob"]) == 32
    assert capsys.readouterr().err == "iohang-mount: warning: option 'frob' is unknown, and ignored\n"
    assert cli.main(["/srv/vm", "/mnt", "-o", "rw,frob"]) == 1
    assert len(helper) == 1


def test_other_namespaces_are_refused(helper: list[SimpleNamespace], capsys) -> None:
    """`-N` is understood and refused, with what to do instead."""
    assert cli.main(["/srv/vm", "/mnt", "-N", "1234", "-o", "rw"]) == 1
    assert "-N: other mount namespaces are not supported; enter it first" in capsys.readouterr().err
    assert not helper


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: SOURCE, MOUNTPOINT"),
        (["/srv/vm"], "the following arguments are required: MOUNTPOINT"),
        (["/srv/vm", "/mnt", "/more\nlines"], "unrecognized arguments: /more lines"),
        (["/srv/vm", "/mnt", "--fore"], "unrecognized arguments: --fore"),
        (["/srv/vm", "/mnt", "-o"], "argument -o: expected one argument"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(
    arguments: list[str], line: str, runs: list[SimpleNamespace], capsys
) -> None:
    """Wrong usage ends in mount(8)'s code 1, with one line that says why, and nothing is mounted."""
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == f"iohang-mount: {line}; see iohang-mount --help\n"
    assert not runs


def test_json_is_for_check(runs: list[SimpleNamespace], capsys) -> None:
    """What would be ignored is refused."""
    assert cli.main(["/srv/vm", "/mnt", "--json"]) == 1
    assert "say --check --json" in capsys.readouterr().err
    assert not runs


def test_each_problem_is_a_line_of_its_own(runs: list[SimpleNamespace], capsys) -> None:
    """All that is wrong with the options is said at once, each line with the program's name."""
    assert cli.main(["/srv/vm", "/mnt", "-o", "timeot=5,interval=0", "-o", "errors=EPERM"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("iohang-mount: option ") for line in lines)
    assert not runs


def test_remount_is_exit_code_32(runs: list[SimpleNamespace], capsys) -> None:
    """`mount -o remount` ends in 32, mount(8)'s code for a mount that failed."""
    assert cli.main(["/srv/vm", "/mnt", "-o", "remount,ro"]) == 32
    assert "unmount and mount again" in capsys.readouterr().err
    assert not runs


def test_the_configuration_file(runs: list[SimpleNamespace], tmp_path: Path) -> None:
    """`-c FILE` is the same as `-o config=FILE`."""
    path = tmp_path / "iohang.yaml"
    path.write_text("timeout: 7\n")
    cli.main(["/srv/vm", "/mnt", "-c", str(path)])
    cli.main(["/srv/vm", "/mnt", "-o", f"config={path}"])
    assert [run.config.read_timeout_s for run in runs] == [7, 7]


@pytest.mark.parametrize("program", ["iohang-mount", "mount.iohang"])
def test_help_shows_each_option_with_its_default(program: str, capsys, monkeypatch) -> None:
    """`--help` names every option and default, what they amount to, and the exit codes, in 100 columns."""
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for key, default, meaning in config.option_table():
        row = next(line for line in text.splitlines() if line.startswith(f"  {key} "))
        assert meaning in row
        assert default in row or default in {config.TRANSIENT, config.MONITOR}
    for said in (
        "up to a minute",
        "every five seconds",
        "EIO, ETIMEDOUT",
        config.MONITOR,
        "32 mount failure",
        "allow_other",
    ):
        assert said in " ".join(text.split())
    assert ("fake" in text) == (program == "mount.iohang")


def test_version(capsys) -> None:
    """`--version` says which."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("iohang-mount 0.")


def test_the_example_configuration_shows_the_defaults(runs: list[SimpleNamespace], tmp_path: Path) -> None:
    """contrib/iohang.yaml changes nothing as it is; without its `#` it sets each key to its default."""
    example = ROOT / "contrib" / "iohang.yaml"
    # `#key: value` is a setting, `# Words` are words.
    bare = re.sub(r"^#(?=\w|  )", "", example.read_text(), flags=re.MULTILINE)
    (tmp_path / "bare.yaml").write_text(bare)
    cli.main(["/srv/vm", "/mnt"])
    cli.main(["/srv/vm", "/mnt", "-c", str(example)])
    cli.main(["/srv/vm", "/mnt", "-c", str(tmp_path / "bare.yaml")])
    defaults, as_it_is, without_marks = (run.config for run in runs)
    assert as_it_is == defaults
    assert without_marks.model_copy(update={"log": None}) == defaults
    assert set(re.findall(r"^(\w+):", bare, re.MULTILINE)) == config.KEYS


def test_the_man_page_names_each_option_with_its_default() -> None:
    """docs/iohang-mount.rst and --help know the same options, and the same defaults."""
    page = (ROOT / "docs" / "iohang-mount.rst").read_text()
    for key, default, _ in config.option_table():
        (heading,) = re.findall(rf"^``{key}=``.*$", page, re.MULTILINE)
        assert f"(default {default})" in heading or not default or len(default) > 9
    assert config.TRANSIENT.replace(":", ", ") in " ".join(page.split())
