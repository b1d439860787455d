"""What every benchmark prints: a table, and with `--json FILE` the same figures with machine, versions and commit."""

import argparse
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    return parser


def machine() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "processor": f"{len(cpu)} × {cpu[0]}" if cpu else platform.processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax")},
        "commit": commit.stdout.strip(),
    }


def show(title: str, rows: list[dict], file: Path | None) -> None:
    about = machine()
    table = Table(
        title=title, caption=", ".join(f"{k} {v}" for k, v in about.items()), title_justify="left"
    )
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    if file:
        file.write_text(
            json.dumps({"title": title, "machine": about, "rows": rows}, indent=2) + "\n"
        )
