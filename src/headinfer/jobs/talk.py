"""The loop of `headinfer chat`: lines come in, answers go out. It needs no terminal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from headinfer.errors import ContextLengthWarning, HeadinferError, RereadWarning, UsageError
from headinfer.jobs.chat import Chat

__all__ = ["COMMANDS", "Terminal", "talk"]

COMMANDS = {
    "/save [NAME]": "write the conversation to its session, or to the session NAME",
    "/undo": "remove the last question and its answer",
    "/stats": "show tokens, times and bytes",
    "/help": "show this list",
    "/quit": "leave, as Ctrl-D does",
}
"""What a user may type besides questions."""


class Terminal(Protocol):
    """Where lines come from and answers go.

    Attributes:
        is_interactive: whether a person types the lines. If not, an error or Ctrl-C ends the loop.
    """

    is_interactive: bool

    def read(self) -> str:
        """Return the next line.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C was pressed.
        """

    def write(self, text: str) -> None:
        """Write a part of an answer."""

    def say(self, line: str) -> None:
        """Show a line that is no answer."""

    def fail(self, line: str) -> None:
        """Show an error."""

    def show(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show a table of names and values."""


def talk(chat: Chat, terminal: Terminal) -> bool:
    """Answer lines until the user leaves: with /quit, Ctrl-D, or Ctrl-C twice at the prompt.

    Ctrl-C ends an answer, and not the conversation.

    Args:
        chat: the conversation.
        terminal: the lines and the answers.

    Returns:
        Whether Ctrl-C ended it.

    Raises:
        HeadinferError: a question cannot be answered, and no person types the lines.
    """
    has_pressed = False
    with _warnings_as_lines(terminal.say):
        while True:
            try:
                line = terminal.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if has_pressed or not terminal.is_interactive:
                    _say_what_is_lost(chat, terminal)
                    return True
                has_pressed = True
                terminal.say("press Ctrl-C again to leave, or Ctrl-D")
                continue
            has_pressed = False
            try:
                goes_on = _answer_line(chat, terminal, line)
            except HeadinferError as error:
                if not terminal.is_interactive:
                    raise
                terminal.fail(str(error))
            except KeyboardInterrupt:  # after the answer, while it was kept
                if not terminal.is_interactive:
                    return True
                terminal.say("interrupted")
            else:
                if goes_on is None:
                    break
                if not goes_on and not terminal.is_interactive:
                    return True
    _say_what_is_lost(chat, terminal)
    return False


def _answer_line(chat: Chat, terminal: Terminal, line: str) -> bool | None:
    """Answer a question or run a command.

    Returns:
        Whether it was done to its end; None if the user leaves.
    """
    if not line.strip():
        return True
    if line.startswith("/"):
        return _run_command(chat, terminal, *line.split(maxsplit=1))
    summary = chat.ask(line.strip(), terminal.write)
    terminal.write("\n")
    if summary.interrupted:
        is_kept = bool(summary.text)
        terminal.say("interrupted: the conversation goes on after this" if is_kept else "interrupted: not asked")
    elif chat.is_cut(summary):
        terminal.say(f"the answer ends after {summary.tokens_out:,} tokens: --max-new-tokens allows more")
    return not summary.interrupted


def _run_command(chat: Chat, terminal: Terminal, name: str, rest: str = "") -> bool | None:
    """Run a command. Returns None if the user leaves, and True otherwise."""
    rest = rest.strip()
    if name in ("/quit", "/exit"):
        return None
    if name == "/help":
        terminal.show(list(COMMANDS.items()))
    elif name == "/stats":
        terminal.show(chat.stats())
    elif name == "/undo":
        terminal.say(f"removed: {chat.undo().question}")
    elif name == "/save":
        terminal.say(f"the conversation is kept in {chat.save(rest or None)}")
    else:
        raise UsageError(f"there is no command {name}: /help lists them, and a space before it makes it a question")
    return True


def _say_what_is_lost(chat: Chat, terminal: Terminal) -> None:
    """Tell a person who leaves that the conversation is not kept."""
    if terminal.is_interactive and not chat.is_saved:
        terminal.say("the conversation was not kept: type /save before you leave, or begin with --keep")


@contextmanager
def _warnings_as_lines(say: Callable[[str], None]) -> Iterator[None]:
    """Show headinfer's warnings about long contexts as lines. Other warnings are shown as before."""
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(message: Any, category: type[Warning], *args: Any, **more: Any) -> None:
            if issubclass(category, ContextLengthWarning | RereadWarning):
                say(f"warning: {message}")
            else:
                show_others(message, category, *args, **more)

        warnings.showwarning = show
        warnings.simplefilter("always", ContextLengthWarning)
        warnings.simplefilter("always", RereadWarning)
        yield
