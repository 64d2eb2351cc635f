"""What the documents show is true: their code runs, their paths are there, their command lines parse."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest

from hierfl.aggregation import Accumulator
from hierfl.cli.root import root
from hierfl.layout import Layout, Role

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "hierfl/DESIGN.md")]
QUICKSTART = ROOT / "examples" / "quickstart" / "app.py"
MAX_CLIENT_LINES = 30

FOLDERS = (".ci", "benchmarks", "combiners", "controller", "examples", "hierfl", "k8s", "tests")
"""First part of what looks like a path in this repository."""

FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s#]+)(?:#[^)\s]*)?\)")
QUOTED = re.compile(r"`(?P<text>[^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})(?:/[\w.-]+)+/?|[A-Z]+\.md|Makefile|pyproject\.toml")


def blocks(text: str, *languages: str) -> list[str]:
    return [fence["text"] for fence in FENCE.finditer(text) if fence["language"] in languages]


def named(document: Path) -> pytest.param:
    return pytest.param(document, id=str(document.relative_to(ROOT)))


documents = pytest.mark.parametrize("document", [named(path) for path in DOCUMENTS])


# --- Code --------------------------------------------------------------------------------------------------


def import_blocks(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import each Python block of a document, in order, as a module that the next may not see."""
    monkeypatch.syspath_prepend(str(folder))
    for index, text in enumerate(blocks(path.read_text(), "python")):
        name = f"shown_in_{path.stem.lower()}_{index}"
        (folder / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        del sys.modules[name]


@pytest.fixture
def fedsign(tmp_path, monkeypatch) -> type[Any]:
    """The strategy that CONTRIBUTING.md shows how to write."""
    modules = list(import_blocks(ROOT / "CONTRIBUTING.md", tmp_path, monkeypatch))
    (kind,) = [module.FedSign for module in modules if hasattr(module, "FedSign")]
    return kind


def test_the_strategy_shown_in_contributing_moves_every_value_as_plain_floats_do(fedsign):
    params = {
        "w": np.array([0.5, -1.25, 3.0, 0.0, 1e-3], np.float32),
        "running": np.array([10.0, -2000.5], np.float32),
    }
    cohort = [
        (3, [0.25, -0.5, 1.0, 0.0, 2.0**-20], [1.5, -3.0]),
        (400, [-0.125, -0.25, -0.5, 0.0, 2.0**-21], [0.25, 7.0]),
        (65_535, [0.5, -0.75, -0.125, 0.0, -(2.0**-30)], [-100.0, 0.5]),
    ]
    layout = Layout.of(params, {"running": Role.MEAN})
    strategy = fedsign(learning_rate=0.25)
    sums = Accumulator(strategy.column_groups(layout))
    for weight, train, mean in cohort:
        sums.fold({"train": [np.array(train, np.float32)], "mean": [np.array(mean, np.float32)]}, weight)
    model = layout.flatten(params)

    after, state = strategy.apply(model, sums.partial(3), strategy.init(model))

    total = sum(weight for weight, _, _ in cohort)
    expected = []
    for i, x in enumerate(params["w"].tolist()):
        delta = sum(weight * train[i] for weight, train, _ in cohort) / total  # exact: few bits each
        expected.append(x + 0.25 * (math.copysign(1.0, delta) if delta else 0.0))
    running = [
        x + sum(weight * mean[i] for weight, _, mean in cohort) / total
        for i, x in enumerate(params["running"].tolist())
    ]
    assert after["train"].tobytes() == np.array(expected, np.float32).tobytes()
    assert after["mean"].tobytes() == np.array(running, np.float32).tobytes()
    assert state.step == 1


def test_the_strategy_shown_in_contributing_says_what_every_strategy_says(fedsign):
    assert fedsign.exact_in_two_tiers is True
    assert dict(fedsign().client_part()) == {}


def client_block(text: str) -> str:
    found = re.search(r"^<!-- client -->\n+(```python\n.*?^```$)", text, re.MULTILINE | re.DOTALL)
    assert found, "no python block follows the line <!-- client -->"
    (block,) = blocks(found[1], "python")
    return block


def test_the_client_in_the_readme_is_the_one_of_the_quickstart():
    assert client_block((ROOT / "README.md").read_text()).encode() == QUICKSTART.read_bytes()


def test_the_quickstarts_client_has_at_most_30_lines():
    assert len(QUICKSTART.read_text().splitlines()) <= MAX_CLIENT_LINES


# --- Paths -------------------------------------------------------------------------------------------------


def missing_paths(document: Path, text: str) -> list[str]:
    """Relative links and quoted repository paths of ``text`` that lead nowhere."""
    prose = FENCE.sub("", text)
    links = [link["target"] for link in LINK.finditer(prose) if not re.match(r"[a-z]+:", link["target"])]
    quoted = [quote["text"] for quote in QUOTED.finditer(prose) if PATH.fullmatch(quote["text"])]
    lost = [target for target in links if not (document.parent / target).exists()]
    return lost + [path for path in quoted if not ((ROOT / path).exists() or (document.parent / path).exists())]


@documents
def test_every_path_in_a_document_is_there(document):
    assert missing_paths(document, document.read_text()) == []


def test_a_path_that_is_not_there_is_found():
    text = """See [one](hierfl/nowhere.py#L3), [two](LICENSE), [web](https://example.org/x) and `hierfl/no/such.py`.
`hierfl/cli` is a folder, `MISSING.md` no file; `my_package/app.py` is no path of ours, nor is `benchmarks/<name>.json`.
```bash
cat `hierfl/in_a_fence.py`
```
"""
    assert missing_paths(ROOT / "README.md", text) == ["hierfl/nowhere.py", "hierfl/no/such.py", "MISSING.md"]


# --- Command lines -----------------------------------------------------------------------------------------


def command_lines(text: str) -> list[list[str]]:
    """The arguments of every ``hierfl`` in the document's shell blocks."""
    found = []
    for block in blocks(text, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            commands = simple_commands(line.removeprefix("$ "))
            found += [words[1:] for words in commands if words and Path(words[0]).name == "hierfl"]
    return found


def simple_commands(line: str) -> Iterator[list[str]]:
    """A line's commands, as words: split at pipes, lists and redirections, without variables set in front."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();<>|&"):
            yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


def problem(
    arguments: list[str], command: click.Command = root, parent: click.Context | None = None, name: str = "hierfl"
) -> str | None:
    """Why ``hierfl`` would not take these arguments; None if it would. Nothing runs, no file is looked for."""
    context = click.Context(command, parent=parent, info_name=name, **command.context_settings)
    try:
        given, rest, seen = command.make_parser(context).parse_args(list(arguments))
        if any(param.is_eager for param in seen):  # --help and --version end it here
            return None
        if isinstance(command, click.Group):
            if not rest:
                return "no command"
            word, found, rest = command.resolve_command(context, rest)
            assert found is not None
            return problem(rest, found, context, word or "")
    except click.ClickException as error:
        return error.format_message()
    absent = [p.name for p in command.params if isinstance(p, click.Argument) and p.required and not is_given(p, given)]
    return f"arguments missing: {absent}" if absent else (f"too many arguments: {rest}" if rest else None)


def is_given(argument: click.Argument, given: dict[str, Any]) -> bool:
    value = given.get(argument.name or "")
    return isinstance(value, str | tuple | list) and bool(value)


@documents
def test_every_command_line_in_a_document_is_one_that_hierfl_takes(document):
    wrong = {shlex.join(line): problem(line) for line in command_lines(document.read_text())}
    assert {line: words for line, words in wrong.items() if words} == {}


def test_command_lines_are_found_in_shell_blocks_only():
    text = """`hierfl demo` in prose.
```bash
make demo   # not `hierfl`
.venv/bin/hierfl demo --regions 2 # a comment
HIERFL_OUTPUT=json hierfl status | jq . && hierfl runs list > runs.txt
hierfl train job.toml \\
  --set "job.rounds=50"
```
```console
$ hierfl explain HFL-101
```
```toml
hierfl nonsense
```
"""
    assert command_lines(text) == [
        ["demo", "--regions", "2"],
        ["status"],
        ["runs", "list"],
        ["train", "job.toml", "--set", "job.rounds=50"],
        ["explain", "HFL-101"],
    ]


@pytest.mark.parametrize(
    "line", ["train job.toml --set job.rounds=50 --detach", "--help", "explain --help", "trace 7 2"]
)
def test_a_command_line_that_hierfl_takes_has_no_problem(line):
    assert problem(line.split()) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trian job.toml", "there is no command 'trian'"),
        ("runs shwo 7f3a", "shwo"),
        ("train job.toml --rounds 3", "No such option '--rounds'"),
        ("train job.toml --set", "requires an argument"),
        ("train", "arguments missing: ['job_file']"),
        ("trace a 1 2", "too many arguments: ['2']"),
    ],
)
def test_a_command_line_that_hierfl_does_not_take_has_its_problem(line, words):
    assert words in str(problem(line.split()))
