"""Behaviour F5: what many clients of every temper leave behind, which is nothing."""

import sys

import pytest

from duomo.bench import soak


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_F5_memory_pages_and_sockets_are_back_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["soak", "--minutes", "1", "--json", str(tmp_path / "soak.json")])
    assert soak.main() == 0, (tmp_path / "soak.json").read_text()


def test_F5_the_verdict_sees_what_is_wrong():
    well = {"pages_held": 0, "running": 0, "sockets": 9, "processes": 4, "own_mib": {"server": 200.0}}
    found = {"num_failures": 0, "answers_5xx": [], "before": well, "after": dict(well)}
    assert soak.verdict(found) == []
    for name, worse in (("pages_held", 1), ("sockets", 10), ("processes", 5), ("own_mib", {"server": 230.0})):
        assert len(soak.verdict({**found, "after": {**well, name: worse}})) == 1, name
    assert soak.verdict({**found, "num_failures": 1}) and soak.verdict({**found, "answers_5xx": ["x"]})


def test_F5_caches_are_told_apart_from_memory():
    state = soak.State(0, 0, 9, 4, {"server": 200.0, "engine": 300.0}, {"engine": 80.0})
    assert state.own_mib == {"server": 200.0, "engine": 220.0}
