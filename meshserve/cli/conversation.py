"""The interactive chat: a conversation in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from meshserve.cli.exits import command_error
from meshserve.cli.output import print_error, stdout_console
from meshserve.cli.streaming import write_footer, write_stream
from meshserve.client import Client
from meshserve.errors import MeshServeError
from meshserve.options import RequestOptions
from meshserve.types import Message

HELP = """\
/help           this list
/clear          forget the conversation
/system TEXT    set the instructions before the conversation; without TEXT, drop them
/model NAME     go on with another model; without NAME, list the models
/quit           leave; Ctrl-D does the same
Ctrl-C          stop the answer"""


class Conversation:
    """A conversation of any number of turns. Errors end a turn, never the conversation.

    Invariant: `messages` alternates between user and assistant, so that a turn which failed before
    any text came leaves no trace.
    """

    def __init__(
        self,
        client: Client,
        options: RequestOptions,
        system: str | None,
        *,
        read_line: Callable[[str], str] = input,
        console: Console | None = None,
    ) -> None:
        self.messages: list[Message] = []
        self.system = system
        self._client = client
        self._options = options
        self._read_line = read_line
        self._console = console or stdout_console()
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._say(HELP),
            "clear": self._clear,
            "system": self._set_system,
            "model": self._set_model,
        }

    def run(self) -> None:
        """Reads and answers until /quit or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - line editing and history for input()
        self._say("A chat with the mesh. /help lists the commands, /quit leaves.")
        while True:
            try:
                line = self._read_line("\nyou> ").strip()
            except KeyboardInterrupt:
                self._console.print()
                self._say("/quit leaves")
                continue
            except EOFError:
                self._console.print()
                return
            except UnicodeDecodeError:
                print_error("that was not UTF-8")
                continue
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)

    def _turn(self, text: str) -> None:
        """Asks, writes the answer as it comes, and remembers both."""
        question = Message("user", text)
        before = [Message("system", self.system)] if self.system else []
        stopped = False
        answer_text = ""
        try:
            with self._client.stream_chat(
                [*before, *self.messages, question], **self._options
            ) as stream:
                try:
                    timing = write_stream(stream.iter_text())
                    answer = stream.collect()
                    answer_text = answer.text
                except KeyboardInterrupt:
                    stopped = True
                    answer_text = stream.text
        except MeshServeError as error:
            shown = command_error(error)
            print_error(shown.message, shown.way_out)
            return
        except KeyboardInterrupt:  # before the first message, or while the stream was closing
            stopped = True
        if answer_text:
            self.messages += [question, Message("assistant", answer_text)]
        if stopped:
            self._say("stopped")
            return
        write_footer(answer.usage, timing, cached=answer.cached, finish_reason=answer.finish_reason)

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        action = self._commands.get(name)
        if action is None:
            self._say(f"there is no /{name}; /help lists the commands")
            return
        try:
            action(argument.strip())
        except MeshServeError as error:
            shown = command_error(error)
            print_error(shown.message, shown.way_out)

    def _clear(self, _: str) -> None:
        self.messages.clear()
        self._say("The conversation is forgotten.")

    def _set_system(self, text: str) -> None:
        self.system = text or None
        self._say("The instructions are set." if text else "There are no instructions now.")

    def _set_model(self, name: str) -> None:
        if not name:
            current = self._options.get("model") or ""
            for model in self._client.models():
                chosen = model.name == current or (not current and model.is_default)
                self._say(f"{'*' if chosen else ' '} {model.name}")
            return
        model = self._client.model(name)
        self._options["model"] = model.name
        self._say(f"Now talking to {model.name}.")

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"))
