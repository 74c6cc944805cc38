import os
import subprocess
import sys

import pytest

from duomo.cli import VERBS, main


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "duomo", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_help_lists_every_verb_and_loads_neither_torch_nor_typer():
    done = run("--help")
    assert done.returncode == 0
    for verb, meaning in VERBS.items():
        assert verb in done.stdout and meaning in done.stdout
    assert "torch" not in done.stderr and "typer" not in done.stderr and "numpy" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    from duomo import __version__

    assert capsys.readouterr().out == f"duomo {__version__}\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["srve"], "did you mean serve?"),
        (["env", "--nonsense"], "No such option"),
        (["env", "surplus"], "unexpected extra argument"),
    ],
)
def test_bad_command_lines_get_one_line_and_exit_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_env_shows_versions_and_variables_but_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("DUOMO_API_KEYS", "very-secret")
    with pytest.raises(SystemExit) as stop:
        main(["env"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "DUOMO_CPU_ISA" in printed and "torch" in printed
    assert "very-secret" not in printed


def test_an_interrupt_exits_130(monkeypatch):
    import duomo.cli

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(duomo.cli, "_dispatch", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["env"])
    assert stop.value.code == 130
