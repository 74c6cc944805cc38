"""What lies in deploy/ names flags and metrics that exist."""

import json
import re
import shlex
from pathlib import Path

from duomo.serve.options import parse

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_dashboard_asks_for_metrics_that_are_there(server):
    server.ask()
    server.ask(temperature=-1)
    there = server.client.get("/metrics").text
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    asked = {
        name for p in panels for t in p["targets"] for name in re.findall(r"(?:vllm|duomo):\w+", t["expr"])
    }
    assert len(asked) > 10
    declared = set(re.findall(r"# TYPE (\S+)", there))
    for name in asked:
        assert name in declared or name.removesuffix("_bucket") in declared, name


def test_the_commands_of_unit_and_container_are_read():
    unit = (DEPLOY / "duomo.service").read_text()
    command = re.search(r"ExecStart=\S+ serve (.*)", unit).group(1)
    assert parse(shlex.split(command.replace("${CREDENTIALS_DIRECTORY}", "/run"))).on_engine_death == "exit"
    entry = json.loads(re.search(r"ENTRYPOINT (\[.*\])", (DEPLOY / "Dockerfile").read_text()).group(1))
    assert parse(entry[2:]).host == "0.0.0.0"
