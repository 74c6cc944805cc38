"""The README, run: every shell block against a real server with the embedded model, every answer checked.

The blocks are read from README.md itself, so a command that changes there changes here. `make run` and
`make test` are the two that cannot be run from inside a test; their parts are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = "472"  # what is written in docs/pictures/digits.png
DUOMO = f"{sys.executable} -m duomo"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def shell(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The server as the README starts it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "duomo", "serve", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(port, server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended before it was ready"
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("the server was not ready within 180 s")


def curls() -> list[str]:
    return [block for block in blocks("sh") if block.startswith("curl")]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("block", curls(), ids=["English, whole", "Chinese, streamed"])
def test_the_curl_gets_the_right_answer(block: str, port: int) -> None:
    said = shell(block.replace(":8180", f":{port}"))
    if '"stream": true' in block:
        lines = [line[6:] for line in said.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    else:
        text = json.loads(said)["choices"][0]["message"]["content"]
    assert text.strip() == NUMBER


def terminal_commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("duomo ")]


def test_ask_answers_about_the_picture() -> None:
    (command,) = (
        line for line in terminal_commands() if line.startswith("duomo ask") and "TARGET" not in line
    )
    assert str(sum(map(int, NUMBER))) in shell(command.replace("duomo", DUOMO, 1))


def test_inspect_names_the_parts() -> None:
    (command,) = (line for line in terminal_commands() if line.startswith("duomo inspect"))
    said = shell(command.replace("duomo", DUOMO, 1))
    assert "text experts" in said and "vision tower" in said


def test_the_quantized_model_reads_the_number_too(tmp_path: Path) -> None:
    quantize, ask = (line for line in terminal_commands() if "TARGET" in line)
    for command in (quantize, ask):
        said = shell(command.replace("duomo", DUOMO, 1).replace("TARGET", str(tmp_path / "two_bits")))
    assert said.strip() == NUMBER
    assert (tmp_path / "two_bits" / "report.md").is_file()


def test_synth_and_plan_on_a_preset_that_fits_a_test(tmp_path: Path) -> None:
    """The README's 28B is 8.5 GB; the same commands on the smallest of the family."""
    lines = [line for line in terminal_commands() if line.startswith(("duomo synth", "duomo plan"))]
    assert len(lines) == 2
    for line in lines:
        small = line.replace("vl-28b-a3b", "0.3b").replace("OUT", str(tmp_path / "out"))
        said = shell(small.replace("duomo", DUOMO, 1))
    assert "GB" in said or "MB" in said


def test_chat_says_goodbye_at_the_end_of_its_input() -> None:
    (command,) = (line for line in terminal_commands() if line.startswith("duomo chat"))
    shell(f"echo Hello | {command.replace('duomo', DUOMO, 1)}")


def test_serve_takes_the_seed_flags(tmp_path: Path) -> None:
    (command,) = (line for line in terminal_commands() if line.startswith("duomo serve"))
    wrong = command.replace("PATH", str(tmp_path / "none")).replace("duomo serve", f"{DUOMO}.serve", 1)
    done = subprocess.run(wrong.split(), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    *notes, error = done.stderr.strip().splitlines()
    assert "has no config.json; give the folder of a checkpoint" in error
    assert all(note.startswith("duomo: --enable-mm") for note in notes)


def test_the_python_of_the_readme_prints_the_number() -> None:
    (program,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == NUMBER, done.stderr
