"""ask and chat over the scripted engine, with real files."""

import os
import subprocess
import sys

import pytest

from duomo.cli import main

PNG = b"\x89PNG\r\n\x1a\n" + bytes(30)


def ask(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["ask", *arguments, "--engine", "scripted"])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_ask_prints_the_answer_alone_and_thinking_apart(capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    code, out, err = ask(capsys, "What is it?", "--image", str(tmp_path / "a.png"), "--thinking")
    assert code == 0 and out.startswith("This is a script") and "Somebody asks" in err
    code, out, err = ask(capsys, "What is it?", "--no-thinking")
    assert code == 0 and out.startswith("This is a script") and err == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["hi", "--image", "no/such.png"], "cannot be read"),
        ([" "], "the question is empty"),
        (["hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["hi", "--engine", "steam"], "steam"),
    ],
)
def test_ask_refuses_in_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        main(["ask", *arguments, *([] if "--engine" in arguments else ["--engine", "scripted"])])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and printed.err.count("\n") == 1


def test_ask_refuses_a_file_that_is_no_picture(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    code, _, err = ask(capsys, "hi", "--image", str(tmp_path / "a.txt"))
    assert code == 2 and "format" in err


def test_chat_takes_commands_questions_and_mistakes(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    lines = [
        f"/image {tmp_path}/a.png",
        "what is it?",
        "/image nowhere.png",
        "/nonsense",
        "/think 2",
        "/again",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "duomo", "chat", "--engine", "scripted"],
        input="\n".join([*lines, "/quit", ""]),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("This is a script") == 2
    assert "nowhere.png cannot be read" in done.stdout and "there is no command /nonsense" in done.stdout
    assert "tokens/s" in done.stdout and "thinking: 2" in done.stdout and "Traceback" not in done.stderr
