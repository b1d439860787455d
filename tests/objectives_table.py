"""Writes the README's table of objectives from the docstrings and signatures of `rlhf.losses`.

python tests/objectives_table.py       # between the two markers in README.md
"""

import importlib
import inspect
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- objectives: python tests/objectives_table.py -->", "<!-- end of objectives -->"
TOPICS = {  # module -> what it is
    "policy": "Policy-gradient surrogates",
    "covariance": "Surrogates that treat tokens of large covariance apart",
    "presets": "Named algorithms: advantages, surrogate and weights",
    "groups": "Group advantages",
    "advantages": "Advantages and returns",
    "ratios": "Log-ratios",
    "kl": "KL estimates",
    "importance": "Importance weights",
    "masks": "Which tokens count",
    "value": "Value losses",
    "routing": "Mixtures of experts",
    "preference": "Preferences, with a reference",
    "divergence": "f-divergences for preferences",
    "reference_free": "Preferences, without a reference",
    "online": "Online preferences",
    "unpaired": "Single completions with a label",
    "reward_model": "Reward models",
    "supervised": "Supervised",
    "distillation": "Distillation",
    "offline": "Offline",
    "weights": "Reduction weights",
    "controllers": "Controllers and moments",
    "moments": "",
}


def functions(module):
    """Public functions of a module of `rlhf.losses`, in the order in which they stand."""
    source = importlib.import_module(f"rlhf.losses.{module}")
    found = [
        f
        for name, f in inspect.getmembers(source, inspect.isfunction)
        if f.__module__ == source.__name__ and name[0] != "_"
    ]
    return sorted(found, key=lambda f: f.__code__.co_firstlineno)


def summary(function) -> tuple[str, str]:
    """The first paragraph of a docstring: `(what it says, its source)`, which stands in parentheses after two spaces."""
    first = (inspect.getdoc(function) or "").split("\n\n")[0]
    first = re.sub(r"\n(?=\()", "  ", first).replace("\n", " ")
    match = re.fullmatch(r"(.*?)  \((.*?)\)([:.]?)(.*)", first)
    if not match:
        return first.rstrip("."), ""
    before, source, colon, after = match.groups()
    return (f"{before}: {after.strip()}" if colon == ":" else before).rstrip("."), source


def defaults(function) -> str:
    """Its knobs: the keyword-only arguments that have a number or a function as default."""
    knobs = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    ]
    shown = [
        (p.name, getattr(p.default, "__name__", p.default)) for p in knobs if p.default is not None
    ]
    return ", ".join(f"{name} {value}" for name, value in shown)


def table() -> str:
    lines = []
    for module, title in TOPICS.items():
        if title:
            lines += [
                "",
                f"**{title}**",
                "",
                "| function | what it computes | source | defaults |",
                "|---|---|---|---|",
            ]
        for function in functions(module):
            cells = (f"`{module}.{function.__name__}`", *summary(function), defaults(function))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip()


def section(readme: str) -> str:
    """The README with a fresh table."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(section(README.read_text()))
