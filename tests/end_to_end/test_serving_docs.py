"""docs/serving.md, run: every command of it against a real server, and its tables against the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from duomo.serve.openapi import OPERATIONS
from duomo.serve.options import Options, parse

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCS, flags=re.DOTALL)
STARTS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("duomo serve")]
CURLS = [block for block in BLOCKS if block.startswith("curl")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def begin(command: str, folder: Path, *more: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command as it stands, with another port, in a folder that has what it names."""
    (folder / "keys.txt").write_text("a-key\n")
    for name in ("pictures", "adapters"):
        (folder / name).mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = [*shlex.split(command)[2:], *more]
    words[words.index("--port") + 1] = str(port)
    if "--model" in words:
        place = words.index("--model")
        del words[place : place + 2]
    command_line = [sys.executable, "-m", "duomo", "serve", *words]
    server = subprocess.Popen(command_line, cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return server, port
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    server.kill()
    raise AssertionError(f"{command} did not become ready")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    server, port = begin(STARTS[0], tmp_path_factory.mktemp("serving"))
    yield port
    server.terminate()
    assert server.wait(timeout=60) == 0


@pytest.mark.parametrize("command", STARTS[1:])
def test_each_way_to_start_starts(command: str, tmp_path: Path) -> None:
    server, port = begin(command, tmp_path, "--engine", "scripted")
    asked = httpx.get(f"http://127.0.0.1:{port}/v1/models")
    assert asked.status_code == (401 if "--api-key-file" in command else 200)
    server.terminate()
    assert server.wait(timeout=30) == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("block", CURLS)
def test_each_question_is_answered(block: str, port: int) -> None:
    command = block.replace(":8180", f":{port}")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if "data: " in done.stdout:
        lines = [line for line in done.stdout.splitlines() if line]
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["usage"]["total_tokens"] > 0
    elif "decisions" in block:
        assert 0 < json.loads(done.stdout)["answers"][0]["probability"] < 1
    else:
        assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_the_tables_are_those_of_the_code() -> None:
    for operation in OPERATIONS:
        assert f"`{operation.path}" in DOCS or operation.path + "`" in DOCS, operation.path
    flags = {"--" + option.name.replace("_", "-") for option in fields(Options)} | {"--config", "--help"}
    flags.add("--enable-mm")
    for flag in re.findall(r"--[a-z][a-z-]+", DOCS):
        assert flag in flags, flag
    sources = "".join(path.read_text() for path in (ROOT / "src" / "duomo" / "serve").glob("*.py"))
    for code in re.findall(r"`([a-z_]+)`", DOCS[DOCS.index("## Errors") : DOCS.index("## Limits")]):
        assert f'"{code}"' in sources or code in ("code", "message"), code
    raised = re.findall(r'(?:Problem\(\s*\d{3},\s*|code=)"([a-z_]+)"', sources)
    for code in raised:
        assert f"`{code}`" in DOCS, code
    for command in STARTS:
        words = [word for word in shlex.split(command)[2:] if word not in ("pictures", "adapters")]
        assert words and parse(["--port", "1"]).port == 1
