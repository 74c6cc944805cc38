"""The `duomo` command: a table of verbs, one file each, loaded only when that verb is run.

`duomo --help` is printed from the table alone, so it needs neither torch nor typer. An `Error` becomes one
line on stderr and exit code 2, Ctrl-C becomes 130, and a closed pipe ends quietly. A verb lives in
`duomo/cli/<verb>.py` as a typer-annotated function of the verb's name, or as a `typer.Typer` named `app`
when it has verbs of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from duomo.errors import Error

VERBS: dict[str, str] = {
    "serve": "Answer over HTTP: OpenAI's wire format, and a page at /.",
    "chat": "Talk in the terminal, with /image PATH and /video PATH.",
    "ask": "Ask one question, about pictures or without, and print the answer.",
    "inspect": "Show a checkpoint's sizes, parameters and bytes by part.",
    "plan": "Say what fits on a machine, or what a recipe would train, before anything is loaded.",
    "quantize": "Bring a checkpoint to 2 bits a weight.",
    "synth": "Make a checkpoint of any size with random weights, to try a machine.",
    "train": "Train or fine-tune from a recipe.",
    "merge": "Fold an adapter into its base, shard by shard.",
    "export": "Write a run or a checkpoint as plain files of a chosen size.",
    "eval": "Measure answers against known truths.",
    "data": "Check, show and convert training rows.",
    "bench": "Measure throughput, latency and kernels.",
    "env": "Show the versions, the machine and every environment variable duomo reads.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 well done, 1 a failed run, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Error as error:
        print(f"duomo: {one_line(error.message)}", file=sys.stderr)
        code = 2
    sys.exit(code)


def one_line(message: str) -> str:
    return " ".join(message.split())


def help_text() -> str:
    width = max(map(len, VERBS)) + 2
    rows = [f"  {verb.ljust(width)}{meaning}" for verb, meaning in VERBS.items()]
    return "\n".join(
        [
            "duomo: ERNIE-4.5-VL on the machine you have.",
            "",
            "Usage: duomo VERB [OPTIONS]",
            "",
            *rows,
            "",
            "duomo VERB --help says more about a verb; duomo --version prints the version.",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if first in ("-V", "--version"):
        from duomo import __version__

        print(f"duomo {__version__}")
        return 0
    if first not in VERBS:
        near = get_close_matches(first, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "duomo --help lists the verbs"
        raise Error(f"there is no verb {first!r}; {hint}")
    return _run_verb(first, arguments[1:])


def _run_verb(verb: str, arguments: list[str]) -> int:
    module = import_module(f"duomo.cli.{verb}")
    if hasattr(module, "run"):  # a verb that parses its own command line
        return int(module.run(arguments) or 0)
    result: Any
    try:
        result = _typer_of(verb, module)(args=arguments, prog_name=f"duomo {verb}", standalone_mode=False)
    except Exception as error:
        code = _code_of_click(verb, error)
        if code is None:
            raise
        return code
    return result if isinstance(result, int) else 0


def _typer_of(verb: str, module: ModuleType) -> Any:
    import typer

    if isinstance(getattr(module, "app", None), typer.Typer):
        return module.app
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(verb, help=VERBS[verb] if getattr(module, verb).__doc__ is None else None)(
        getattr(module, verb)
    )
    return app


def _code_of_click(verb: str, error: Exception) -> int | None:
    """The exit code of a complaint by the command-line library, printed as one line; None for any other.

    Told by shape: typer carries its own copy of click in some versions and uses click itself in others.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        print(getattr(error, "message", ""))
        return 0
    if hasattr(error, "format_message"):
        print(f"duomo {verb}: {one_line(error.format_message())} (duomo {verb} --help)", file=sys.stderr)
        return 2
    return 130 if type(error).__name__ == "Abort" else None
