"""The documents are true: references lead to tests that quote the promise, commands and files exist."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from iohang_fuse import cli, config, ctl
from tests.core.test_layers import EDGE, MODULES, PURE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SEMANTICS = (DOCS / "semantics.rst").read_text()
PROMISES = dict(re.findall(r"^(P\d+) .*?\n=+\n(.*?)(?=^P\d+ |\Z)", SEMANTICS, flags=re.MULTILINE | re.DOTALL))


def references() -> list[tuple[str, str, str]]:
    return [
        (promise, file, test)
        for promise, text in PROMISES.items()
        for file, test in re.findall(r"``(tests/\S+\.py)::(\w+)``", text)
    ]


def test_all_promises_are_there() -> None:
    """Each promise "stands in docs/semantics.rst with the test that proves it", or says that it is not there yet."""
    assert [*PROMISES] == [f"P{number}" for number in range(1, 13)]
    for promise, text in PROMISES.items():
        assert "``tests/" in text or "Not yet." in text, promise


@pytest.mark.parametrize(("promise", "file", "test"), references())
def test_references(promise: str, file: str, test: str) -> None:
    """A test that is named as a proof exists and has a docstring."""
    functions = {
        node.name: ast.get_docstring(node)
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert functions.get(test), f"{promise}: {file} has no {test} with a docstring"


@pytest.mark.parametrize("document", ["README.rst", *(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.rst"))])
def test_links(document: str) -> None:
    """What a document links to or names as a file of this tree is there."""
    text = (ROOT / document).read_text()
    paths = re.findall(r"<((?:docs|contrib)/[^>]+)>`_", text)
    paths += re.findall(r"(?<![\w/.-])((?:iohang_fuse|tests|contrib)/[\w./-]*\w)", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{document} names {path}"


# ---- reference


def page(name: str) -> str:
    return (DOCS / f"{name}.rst").read_text()


PROGRAMS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
"""All that the package installs: none is without its page."""


def help_of(program: str, *verb: str) -> str:
    """What *program* says of its options, as the one that is installed under that name."""
    module, function = PROGRAMS[program].split(":")
    code = f"import sys; sys.argv[0] = {program!r}; from {module} import {function} as main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *verb, "--help"], capture_output=True, text=True, check=True
    ).stdout


def options_in(text: str) -> set[str]:
    lines = re.findall(r"^ +(-.*?)(?:  |$)", text, re.MULTILINE)
    return {option for line in lines for option in re.findall(r"(?:^|, )(--?[\w-]+)", line)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_option_of_help_is_in_the_manual_page(program: str) -> None:
    """Each option that `--help` shows is in the manual page."""
    text = page("iohang-mount" if program == "mount.iohang" else program)
    options = options_in(help_of(program))
    assert {"-h", "--help"} <= options
    assert {option for option in options if f"**{option}**" not in text} == set()


def test_each_verb_of_iohangctl_is_in_its_manual_page() -> None:
    """Each verb that `--help` shows is in the manual page, with its options."""
    text = page("iohangctl")
    verbs = re.findall(r"^    ([a-z][\w-]*)", help_of("iohangctl"), re.MULTILINE)
    assert {"status", "drain", "set"} <= {*verbs}
    for verb in verbs:
        assert f"**{verb}**" in text
        assert {option for option in options_in(help_of("iohangctl", verb)) if f"**{option}**" not in text} == set()


DEFAULTS_IN_WORDS = {
    "errors": "default below",  # see test_the_default_errors_are_in_iohang_yaml
    "log": "default: stderr in the foreground, the journal or syslog in the background",
}


@pytest.mark.parametrize("key", sorted(config.KEYS))
def test_each_key_is_in_iohang_yaml(key: str) -> None:
    """iohang.yaml(5) has each key, with its default as a user writes it."""
    defaults = {name: default for name, default, _ in config.option_table()}
    (entry,) = [
        line
        for line in page("iohang.yaml").splitlines()
        if line.startswith("``") and f"``{key}``" in line.split(" (")[0]
    ]
    if key in DEFAULTS_IN_WORDS:
        assert DEFAULTS_IN_WORDS[key] in entry
    else:
        assert f"default ``{defaults[key]}``" in entry or f"default: ``{defaults[key]}``" in entry


def test_iohang_yaml_has_no_other_key() -> None:
    """iohang.yaml(5) tells of no key that is refused."""
    heads = re.findall(r"^(``\w+``(?:, ``\w+``)*) \(.*\)$", page("iohang.yaml"), re.MULTILINE)
    assert {key for head in heads for key in re.findall(r"``(\w+)``", head)} == {*config.KEYS}


def test_the_default_errors_are_in_iohang_yaml() -> None:
    """iohang.yaml(5) has the errors that are transient, and those that cannot be."""
    text = " ".join(page("iohang.yaml").split())
    assert config.TRANSIENT.replace(":", ", ") in text
    assert all(name in text for name in {*config.NEVER_TRANSIENT, *config.RETRIED_AT_ONCE})


def test_mistakes_are_told_as_iohang_yaml_says(tmp_path: Path) -> None:
    """iohang.yaml(5): "All of them are told at once, with file, line and key, and what would be right"."""
    file = tmp_path / "iohang.yaml"
    file.write_text("# two\n# comments\nintervall: 3\ntimeout: 90 s\n")
    with pytest.raises(config.ConfigError) as error:
        config.load("/srv", "/mnt", file=str(file))
    assert len(error.value.problems) == 2
    for problem in error.value.problems:
        assert f"    iohang-mount: {problem.replace(str(file), '/etc/iohang.yaml')}\n" in page("iohang.yaml")


def test_each_module_has_its_room() -> None:
    """docs/architecture.rst names each module of iohang_fuse/, and says of which kind it is, as test_layers.py has it."""
    rooms = dict(re.findall(r"^``([\w/]+)\.py`` +(\w+) ", page("architecture"), re.MULTILINE))
    kinds = {
        module.replace(".", "/"): "pure" if module in PURE else "edge" if module in EDGE else "shell"
        for module in MODULES
    }
    missing = [
        f"``{module}.py``  {kinds[module]}  {about(module)}"
        for module in MODULES
        if module.replace(".", "/") not in rooms
    ]
    assert not missing, "rooms that docs/architecture.rst has not:\n" + "\n".join(missing)
    assert rooms == kinds


def about(module: str) -> str:
    """The first line of its docstring."""
    return (ast.get_docstring(ast.parse((ROOT / f"iohang_fuse/{module}.py").read_text())) or "").partition("\n")[0]


# ---- commands in the text

PAGES = {*DOCS.rglob("*.rst"), ROOT / "README.rst"} - {DOCS / "changes.rst"}  # which says what is not there yet
TEXTS = [path.read_text() for path in PAGES]


def commands(program: str) -> list[str]:
    """What the documents tell to type, in literal blocks and in sentences, up to a pipe or a comment."""
    found = set()
    for text in TEXTS:
        found |= {*re.findall(rf"``({program} [^`]+)``", text)}
        found |= {*re.findall(rf"^    (?:# )?({program} [^|;#\n]+)", text, re.MULTILINE)}
    return sorted({command.strip() for command in found})


@pytest.mark.parametrize("command", commands("iohangctl"))
def test_iohangctl_takes_what_the_documents_say(command: str) -> None:
    """No document has a command that iohangctl refuses."""
    words = shlex.split(command.replace("...", ""))[1:]
    if words[-1:] == ["set"]:  # named, and not typed so
        words.append("timeout=1")
    if "--help" not in words:
        assert ctl._parser().parse_args(words).verb


@pytest.mark.parametrize(
    "command", [each for each in commands("iohang-mount") if " /" in each and "--version" not in each]
)
def test_iohang_mount_takes_what_the_documents_say(command: str) -> None:
    """No document has a mount that iohang-mount refuses."""
    given = cli._parser(helper=False).parse_args(shlex.split(command)[1:])
    assert config.load(given.source, given.mountpoint, given.options)


def lines_of_fstab() -> list[str]:
    return sorted(
        {
            line.strip()
            for text in TEXTS
            for line in re.findall(r"^    (/\S+ +/\S+ +(?:fuse\.)?iohang\S* +\S+ +\d +\d)$", text, re.MULTILINE)
        }
    )


@pytest.mark.parametrize("line", lines_of_fstab())
def test_lines_of_fstab_are_taken(line: str) -> None:
    """No document has a line for fstab(5) that is refused, or that comes up before its source or the network."""
    source, mountpoint, kind, options, *_ = line.split()
    assert kind in {"iohang", "fuse.iohang-mount"}
    words = [word for word in config.split_options(options) if not word.startswith("config=")]
    assert config.load(source, mountpoint, [",".join(words)])
    assert {"_netdev", f"x-systemd.requires-mounts-for={source}"} <= {*words}


def test_there_are_commands_to_look_at() -> None:
    """The patterns above find something."""
    assert len(commands("iohangctl")) > 15
    assert len(commands("iohang-mount")) > 4
    assert len(lines_of_fstab()) >= 3
