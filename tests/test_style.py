"""The words of the code base, its comments and its columns."""

import ast
import re
from pathlib import Path

import pytest

from rlhf import cli
from rlhf.command_line import options_of

ROOT = Path(__file__).parent.parent
# One word a thing, the field's: completion, prompt, reward function, metrics, options, sampled, group_size, …
BANNED = set(
    """
    answer answers question questions asked judge judges judged figures seen knob knobs how whole learn learnt begin begun kept
    made told drawing drawn together own once hear heard emit chances
    """.split()
)
# A problem's final answer is an answer: it is read out of a completion and held against the right one.
FINAL_ANSWERS = re.compile(r"rollouts/(answers|reward_functions)\.py|rlhf/tasks/")
OF_FINAL_ANSWERS = {"answer", "answers"}


def sources(*folders: str):
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(("rlhf/losses/", "rlhf/rollouts/")):  # links
                yield name, path.read_text()


def identifiers(text: str):
    """Names that a file gives: of variables, parameters, functions and classes, with their lines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def words(name: str) -> set[str]:
    return {word.lower() for word in re.split(r"_|(?<=[a-z])(?=[A-Z])", name)}


def test_no_identifier_has_a_word_that_the_field_does_not_use():
    found = []
    for file, text in sources("rlhf", "losses", "rollouts"):
        allowed = OF_FINAL_ANSWERS if FINAL_ANSWERS.match(file) else set()
        for name, line in identifiers(text):
            if words(name) & (BANNED - allowed):
                found.append(f"{file}:{line} {name}")
    assert not found, "\n".join(found)


IN_TEXT = re.compile(
    r"\b(questions?|asked|judges?|judged|figures|knobs?|drawn|drawing|seen|learnt)\b"
)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_the_field_s_words(command):
    import importlib

    module, summary = cli.COMMANDS[command]
    assert not IN_TEXT.search(summary)
    for name, option in options_of(importlib.import_module(module).main).items():
        assert not words(name) & BANNED, name
        example = re.sub(
            r"\{question: prompt,\s*answer: solution\}", "", option.text
        )  # columns of a data set
        assert not IN_TEXT.search(example), f"--{name}: {option.text}"


def test_metrics_have_the_field_s_words():
    page = (ROOT / "docs" / "metrics.md").read_text()
    names = re.findall(r"`([\w/]+)`", page)
    assert len(names) > 40
    for name in names:
        assert not set(re.split(r"[_/]", name.lower())) & BANNED, name


def test_comments_say_why_and_lines_fit():
    lines = [line for _, text in sources("rlhf", "rollouts") for line in text.splitlines()]
    comments = [line for line in lines if line.lstrip().startswith("# ")]
    assert len(comments) >= 0.020 * len(lines)
    assert sum(len(line) > 100 for line in lines) < 0.01 * len(lines)
