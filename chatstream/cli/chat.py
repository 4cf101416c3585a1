"""`chat`: a conversation in the terminal, or one question and its answer."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from chatstream.cli.answer import Reader
from chatstream.cli.interrupt import Interrupt
from chatstream.cli.terminal import Terminal
from chatstream.errors import ProviderEvent, StreamError
from chatstream.stream.outcome import Cause

if TYPE_CHECKING:
    from chatstream.service.service import Service
    from chatstream.stream.iterable import StreamIterable


STOPPED = "[stopped]"
"""Ends an answer that was stopped, for who reads it and for the model."""

INTERRUPTED = 130
"""The exit code after a Ctrl-C, as a shell has it: 128 and SIGINT's number."""


class Options(NamedTuple):
    """What a conversation may be told.

    Attributes:
        model: In the place of the settings'.
        session_id: The chat's; made up when None.
        system: The system's message, before all others.
    """

    model: str | None = None
    session_id: str | None = None
    system: str | None = None


class Conversation:
    """Questions and answers, in this process, through `Service.open`. One thread at a time."""

    def __init__(
        self,
        service: Service,
        terminal: Terminal,
        interrupt: Interrupt,
        options: Options,
        *,
        reasoning: bool = True,
    ) -> None:
        """
        Args:
            service: Has the settings, and opens the streams.
            terminal: Where the answers go.
            interrupt: Entered already.
            options: See there.
            reasoning: Whether it is shown what the model thinks aloud.
        """
        self.messages: list[dict[str, str]] = []
        if options.system:
            self.messages.append({"role": "system", "content": options.system})
        self._service = service
        self._terminal = terminal
        self._interrupt = interrupt
        self._model = options.model or service.settings.model
        self._session_id = options.session_id or uuid.uuid4().hex
        self._reasoning = reasoning

    def ask(self, question: str) -> int:
        """Asks, and writes the answer as it comes.

        The answer, also a stopped one, becomes part of the conversation; of a failure nothing does.

        Returns:
            0, 1 when it failed (the reason was written to standard error), or `INTERRUPTED`.
        """
        self.messages.append({"role": "user", "content": question})
        with self._interrupt.answering():
            try:
                source = self._service.open(self._payload(), session_id=self._session_id)
            except StreamError as error:
                return self._failed(error.message)
            with contextlib.closing(source):
                self._interrupt.stop_with(partial(source.stream.abort, Cause.CANCEL))
                answer = _Answer(self._terminal, reasoning=self._reasoning)
                answer.read(source)
            return self._end(source, answer)

    def _end(self, source: StreamIterable, answer: _Answer) -> int:
        stream = source.stream
        answer.end_line()
        if stream.cause is not None and stream.error is None:  # a stop, of ours or of somebody's
            self._terminal.complain(STOPPED)
            said = f"{answer.text}\n{STOPPED}" if answer.text else STOPPED
            self.messages.append({"role": "assistant", "content": said})
            return INTERRUPTED
        if stream.error is not None:
            return self._failed(_words(stream.error, answer.error))
        self.messages.append({"role": "assistant", "content": answer.text})
        return 0

    def _failed(self, words: str) -> int:
        self.messages.pop()
        self._terminal.complain(words)
        return 1

    def _payload(self) -> bytes:
        body: dict[str, Any] = {"model": self._model, "messages": self.messages, "stream": True}
        return json.dumps(body).encode()


class _Answer:
    """One answer on its way to the terminal."""

    def __init__(self, terminal: Terminal, *, reasoning: bool) -> None:
        self.text = ""
        self._reader = Reader()
        self._terminal = terminal
        self._reasoning = reasoning
        self._thinking = False  # what was written last
        self._last = "\n"  # the last character that was

    @property
    def error(self) -> str:
        """What the provider said of a failure, or ""."""
        return self._reader.error

    def read(self, source: StreamIterable) -> None:
        """Writes what comes, to its end; a spinner until the first of it."""
        with contextlib.ExitStack() as waiting:
            waiting.enter_context(self._terminal.waiting("waiting for the provider"))
            for data in source:
                for piece in self._reader.feed(data):
                    if piece.reasoning and not self._reasoning:
                        continue
                    waiting.close()
                    self._write(piece.text, piece.reasoning)

    def _write(self, text: str, thinking: bool) -> None:
        if self._thinking and not thinking:
            self.end_line()
        self._thinking = thinking
        self._terminal.write(text, "dim" if thinking else "")
        self._last = text[-1]
        if not thinking:
            self.text += text

    def end_line(self) -> None:
        """What is written next begins a line."""
        if self._last != "\n":
            self._terminal.write("\n")
            self._last = "\n"


def _words(error: StreamError, said: str) -> str:
    """What went wrong, for who runs the service: as the provider `said` it, if it did."""
    if isinstance(error, ProviderEvent) and said:
        return said
    return f"{error.message} ({error.code}{': ' + error.detail if error.detail else ''})"


def once(service: Service, terminal: Terminal, question: str, options: Options) -> int:
    """One question; nothing but the answer goes to standard output.

    Returns:
        The exit code.
    """
    with Interrupt() as interrupt:
        return Conversation(service, terminal, interrupt, options, reasoning=False).ask(question)


def converse(service: Service, terminal: Terminal, options: Options) -> int:
    """Asks for questions until Ctrl-C or Ctrl-D at the prompt.

    Returns:
        The exit code.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 # input() has arrows and a history from now on
    terminal.line("Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does.", "dim")
    with Interrupt() as interrupt, contextlib.suppress(EOFError, KeyboardInterrupt):
        conversation = Conversation(service, terminal, interrupt, options)
        while True:
            if question := _question(terminal):
                conversation.ask(question)
    terminal.line()
    return 0


def _question(terminal: Terminal) -> str:
    """What is typed. Raises EOFError and KeyboardInterrupt."""
    if terminal.interactive:
        return input("> ").strip()
    sys.stderr.write("> ")  # else it would stand among the answers
    sys.stderr.flush()
    return input().strip()
