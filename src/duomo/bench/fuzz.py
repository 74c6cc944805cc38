"""`python -m duomo.bench.fuzz`: schemathesis asks a server all that its OpenAPI file allows, and more.

No answer may be a 5xx, and each must have a status, a type and a body that the file declares. The server is
started here with fixed text for a model. schemathesis needs an environment of its own (`--python`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from duomo.bench.overhead import free_port, wait_for

_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance"
)


def command(python: Path, url: str, examples: int, only: str = "", seed: int = 1) -> list[str]:
    """Fuzzing phases alone: `examples` of each operation whose path matches `only`, however slow we are."""
    return [
        str(python), "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", _CHECKS,
        "--max-examples", str(examples), "--seed", str(seed), "--phases", "examples,fuzzing",
        "--request-timeout", "10", "--suppress-health-check", "too_slow",
        *(["--include-path-regex", only] if only else []),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=Path("runs/clients/bin/python"))
    parser.add_argument("--examples", type=int, default=2000, help="in all, over the operations")
    parser.add_argument("--only", default="", help="a pattern of paths; the others are left out")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    port = free_port()
    flags = ["--engine", "scripted", "--port", str(port), "--log-level", "error", "--limit-mm-per-prompt"]
    flags += ['{"image": 4}', "--lora-root", tempfile.mkdtemp()]  # without a root adapters are but refused
    server = subprocess.Popen([sys.executable, "-m", "duomo.serve", *flags])
    try:
        wait_for(port)
        began = time.monotonic()
        each = -(-asked.examples // _num_operations(port, asked.only))
        asking = command(asked.python, f"http://127.0.0.1:{port}", each, asked.only)
        done = subprocess.run(asking, capture_output=True, text=True)
    finally:
        server.terminate()
        server.wait(timeout=20)
    print(done.stdout[-6000:] + done.stderr[-2000:])
    generated = re.search(r"(\d+) generated", done.stdout)
    figures = {
        "generated": int(generated.group(1)) if generated else None,
        "passed": done.returncode == 0,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(figures)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    return done.returncode


def _num_operations(port: int, only: str) -> int:
    """Operations that take something: the others are asked once or twice, since there is nothing to vary."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    rows = [row for path, row in paths.items() if re.search(only, path)]
    return sum("requestBody" in operation for row in rows for operation in row.values())


if __name__ == "__main__":
    sys.exit(main())
