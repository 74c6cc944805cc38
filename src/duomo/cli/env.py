"""`duomo env`: what a bug report needs. Versions are read from package metadata, so nothing is loaded."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from duomo import __version__
from duomo.env import VARIABLES

_PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "pillow", "av", "msgspec", "pyzmq",
    "llguidance", "starlette", "uvicorn", "httpx", "prometheus-client",
)  # fmt: skip


def env(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the versions, the machine and every environment variable duomo reads. No secret is printed."""
    facts = {"versions": _versions(), "machine": _machine(), "variables": _variables()}
    if json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(facts)).decode())
        return
    for title, rows in facts.items():
        print(title)
        width = max(len(name) for name in rows) + 2
        for name, value in rows.items():
            print(f"  {name.ljust(width)}{value}")


def _versions() -> dict[str, str]:
    found = {"duomo": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    memory = "unknown"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores this process may use": str(cores),
        "memory": memory,
        "python at": sys.executable,
    }


def _variables() -> dict[str, str]:
    rows = {}
    for variable in VARIABLES:
        is_secret = "KEY" in variable.name
        value = "set" if is_secret and variable.get() else repr(variable.get())
        rows[variable.name] = f"{value}  ({variable.meaning})"
    return rows
