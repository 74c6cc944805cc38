"""Other projects' official clients against a running server, each in its own process and environment.

The environment is made once: `python -m venv runs/clients && runs/clients/bin/pip install openai anthropic
langchain-openai instructor schemathesis`. Without it these tests are skipped.
"""

import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import picture_url

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "runs" / "clients" / "bin" / "python"
needs_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs runs/clients, an environment with the clients (see this file's top)"
)


def run(*command):
    return subprocess.run([str(PYTHON), *command], capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.clients
@needs_clients
@pytest.mark.parametrize("client", ["openai", "anthropic", "langchain", "instructor"])
def test_an_official_client_is_content(server, client):
    done = run(str(Path(__file__).parent / "clients" / "suite.py"), client, server.url, picture_url())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.clients
@needs_clients
def test_schemathesis_finds_no_5xx_and_no_answer_off_its_schema(server):
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    done = run(
        "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", checks,
        "--max-examples", "30", "--seed", "1", "--phases", "examples,fuzzing", "--request-timeout", "10",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
