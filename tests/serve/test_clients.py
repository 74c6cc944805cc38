"""Other projects' official clients against a running server, each in its own process and environment.

The environments are made once; two of Python, since not every client is content with the newest openai:

    python -m venv runs/clients
    runs/clients/bin/pip install anthropic langchain-openai instructor schemathesis
    python -m venv runs/openai && runs/openai/bin/pip install 'openai>=3.57'
    mkdir -p runs/node && npm install --prefix runs/node openai

A test whose environment is missing is skipped.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import picture_url

ROOT = Path(__file__).parents[2]
SUITE = Path(__file__).parent / "clients"
RUNS = ROOT / "runs"


def run(*command, cwd=ROOT):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]


def needs(path):
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(ROOT)}, made as this file's top says")
    return path


@pytest.mark.clients
@pytest.mark.parametrize(
    "client, place",
    [
        ("openai", "openai"),
        ("openai", "clients"),
        ("anthropic", "clients"),
        ("langchain", "clients"),
        ("instructor", "clients"),
    ],
)
def test_an_official_client_of_python_is_content(server, client, place):
    python = needs(RUNS / place / "bin" / "python")
    run(python, SUITE / "suite.py", client, server.url, picture_url())


@pytest.mark.clients
@pytest.mark.skipif(not shutil.which("node"), reason="needs Node")
def test_the_official_client_of_node_is_content(server):
    needs(RUNS / "node" / "node_modules" / "openai")
    run("node", SUITE / "suite.mjs", server.url, picture_url(), cwd=RUNS / "node")


@pytest.mark.clients
def test_schemathesis_finds_no_5xx_and_no_answer_off_its_schema(server):
    from duomo.bench.fuzz import command

    run(*command(needs(RUNS / "clients" / "bin" / "python"), server.url, examples=30))
