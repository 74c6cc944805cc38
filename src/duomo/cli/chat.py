"""`duomo chat`: a conversation in the terminal. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from duomo.cli.talk import Talk
    from duomo.processing.messages import ImagePart, VideoPart

COMMANDS = {
    "/image PATH": "add a picture to the next question",
    "/video PATH": "add a video to the next question",
    "/think on|off|auto|N": "think first, or not, or by the rule, or for at most N tokens",
    "/again": "answer the last question once more",
    "/new": "forget the conversation",
    "/help": "show this",
    "/quit": "leave (Ctrl-D too)",
}


class Chat:
    """The state between two lines: pending media, the thinking switch, the talk."""

    def __init__(self, talk: Talk, max_tokens: int | None, seed: int | None) -> None:
        self.talk, self.max_tokens, self.seed = talk, max_tokens, seed
        self.pending: list[ImagePart | VideoPart] = []
        self.thinking: bool | None = None
        self.budget: int | None = None

    def take(self, line: str) -> bool:
        """Handles one line; False when it was the last. An Error of a command is printed, not raised."""
        from duomo.cli.talk import user_turn
        from duomo.errors import Error

        line = line.strip()
        try:
            if line.startswith("/"):
                return self._command(*line.partition(" ")[::2])
            if line:
                self.talk.history.append(user_turn(line, self.pending))
                self.pending = []
                self._answer()
        except Error as error:
            self.say(" ".join(error.message.split()), "red")
            if self.talk.history and self.talk.history[-1].role == "user":
                self.talk.history.pop()
        return True

    def _answer(self) -> None:
        from duomo.cli.talk import params_of
        from duomo.processing.messages import Message

        start = time.monotonic()
        said = self.talk.answer(params_of(self.thinking, self.budget, self.max_tokens, self.seed))
        if said is None:
            self.talk.history.pop()
            return
        self.talk.history.append(Message.of("assistant", said.text))
        spent, made = time.monotonic() - start, said.usage.completion_tokens
        asked = said.usage.prompt_tokens
        note = f"{asked} + {made} tokens, {spent:.1f} s, {made / max(spent, 1e-9):.1f} tokens/s"
        self.say(note + (", cut at the limit" if said.finish_reason == "length" else ""), "dim")

    def _command(self, name: str, value: str) -> bool:
        from duomo.cli.talk import part_of
        from duomo.errors import PromptError

        value = value.strip().strip("'\"")
        if name in ("/quit", "/exit"):
            return False
        if name in ("/image", "/video"):
            if not value:
                raise PromptError(f"{name} needs a path: {name} picture.png")
            self.pending.append(part_of(value, name[1:]))
            self.say(f"{value} goes with the next question", "dim")
        elif name == "/think":
            self._think(value)
        elif name == "/new":
            self.talk.history.clear()
            self.pending = []
            self.say("forgotten", "dim")
        elif name == "/again":
            while self.talk.history and self.talk.history[-1].role != "user":
                self.talk.history.pop()
            if not self.talk.history:
                raise PromptError("nothing was asked yet")
            self._answer()
        elif name == "/help":
            width = max(map(len, COMMANDS)) + 2
            self.say("\n".join(c.ljust(width) + meaning for c, meaning in COMMANDS.items()), "dim")
        else:
            raise PromptError(f"there is no command {name}; /help lists them")
        return True

    def _think(self, value: str) -> None:
        from duomo.errors import PromptError

        if value.isdigit():
            self.thinking, self.budget = int(value) > 0, int(value) or None
        elif value in ("on", "off", "auto"):
            self.thinking, self.budget = {"on": True, "off": False, "auto": None}[value], None
        else:
            raise PromptError("/think needs on, off, auto or a number of tokens")
        self.say(f"thinking: {value}", "dim")

    def say(self, text: str, style: str) -> None:
        from rich.text import Text

        self.talk.console.print(Text(text, style=style))


def chat(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder; without it the embedded model.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of one answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory that duomo may use, as 5G.")] = None,
    engine: Annotated[str, typer.Option(help="model, or scripted for fixed text.")] = "model",
) -> None:
    """Talk in the terminal, with /image PATH and /video PATH."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from rich.console import Console

    from duomo.cli.talk import Talk

    talk = Talk.open(model, engine, Console(soft_wrap=True, highlight=False), ram)
    try:
        room = Chat(talk, max_tokens, seed)
        room.say(f"{talk.backend.facts.name}. /help lists the commands.", "dim")
        words = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
        session: PromptSession[str] = PromptSession(completer=words, complete_while_typing=False)
        while True:
            try:
                if not room.take(session.prompt("> ")):
                    return
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
    finally:
        talk.close()
