"""What `help` and the completion of a prompt show of the package."""

import importlib
import pkgutil
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import rlhf
from rlhf import cli, recipes

SHELL = {
    "cli",
    "command_line",
    "demo",
    "fields",
    "files",
    "json_text",
    "tools",
    "trl_names",
    "trl_tables",
    "yaml_files",
    "losses",
}


def test_every_field_of_every_public_tuple_is_documented():
    seen = 0
    for found in pkgutil.walk_packages(rlhf.__path__, "rlhf."):
        if found.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(found.name)).values():
            if (
                isinstance(kind, type)
                and issubclass(kind, tuple)
                and hasattr(kind, "_fields")
                and kind.__name__[0] != "_"
            ):
                if not kind.__module__.startswith("rlhf"):
                    continue
                listed = re.findall(
                    r"^ +(\w+): ", (kind.__doc__ or "").partition("Attributes:")[2], re.MULTILINE
                )
                assert listed[: len(kind._fields)] == list(kind._fields), kind
                for name in kind._fields:
                    assert not getattr(kind, name).__doc__.startswith("Alias for field"), (
                        kind,
                        name,
                    )
                seen += 1
    assert seen > 70


def test_the_version_is_the_package_s(capsys):
    assert rlhf.__version__ == metadata.version("rlhf")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf {rlhf.__version__}\n"


def test_completion_finds_what_there_is():
    modules = {
        file.stem
        for file in Path(rlhf.__file__).parent.iterdir()
        if file.stem[0] not in "_." and file.suffix in ("", ".py")
    }
    assert modules - SHELL <= set(dir(rlhf))
    assert {name for name, (module, _) in cli.COMMANDS.items() if ".recipes." in module} <= set(
        dir(recipes)
    )
    for name in dir(recipes):
        assert getattr(recipes, name).__name__ == f"rlhf.recipes.{name}"


def test_completion_imports_nothing():
    code = "import sys, rlhf, rlhf.recipes; dir(rlhf), dir(rlhf.recipes); assert 'jax' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
