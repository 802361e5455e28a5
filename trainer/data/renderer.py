"""Chat templates asked from outside: one bounded process renders for this one, started once, a batch at a time.

Every conversation is rendered there, not a probe alone: which path a template takes depends on the data. The price is
JSON over a pipe in batches; the numbers are in docs/security.md.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import trainer
from trainer.config.errors import RunError, UserError
from trainer.data import guard
from trainer.data.chat import Message
from trainer.data.guard import TokenizerFault
from trainer.data.render_process import READY
from trainer.data.template import Conversation, Dialect, Rendered, Span

Answer = dict[str, Any] | UserError
START_SECONDS = 120.0  # Python and transformers' chat templates: 1 s on a quiet machine
IDLE_SECONDS = 30.0  # after which it is not asked again but started anew; it leaves by itself a little later
CLOCK_SECONDS = 30.0  # for one conversation, against a process that is stopped: CPU time is what ends a template
BATCH_BYTES = 4 << 20  # of conversations that travel together
ANSWER_BYTES = 256 << 20
KEPT = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def render(dialect: Dialect, conversations: Sequence[Conversation], train_on: str) -> list[Rendered | UserError]:
    """Each conversation as text with its target spans, or its own fault, in order.

    ``train_on``: assistant, last-assistant or all. Raises TokenizerFault where the template takes more time or memory
    than it is given, and for what is no conversation's fault.
    """
    answers = _renderer.ask(dialect, conversations, train_on)
    return [
        answer
        if isinstance(answer, UserError)
        else Rendered(answer["text"], tuple(Span(*span) for span in answer["spans"]))
        for answer in answers
    ]


def prompt(dialect: Dialect, conversation: Conversation) -> tuple[str, str]:
    """(text before the last answer with the generation prompt, that answer). Raises as `Chat.prompt` does."""
    answer = _single(dialect, conversation, "prompt")
    return answer["text"], answer["reference"]


def whole(dialect: Dialect, messages: Sequence[Message]) -> str:
    """The text of a conversation that is nobody's data; known once asked. Raises UserError where it is refused."""
    answer = _whole(json.dumps(asdict(dialect)), json.dumps(messages))
    if isinstance(answer, UserError):
        raise answer
    return answer


@functools.lru_cache(maxsize=64)
def _whole(dialect: str, messages: str) -> str | UserError:
    try:
        return _single(Dialect(**json.loads(dialect)), Conversation("a probe", json.loads(messages)), "whole")["text"]
    except TokenizerFault:
        raise
    except UserError as error:
        return error


def start() -> None:
    """Let the process begin to start, where it does not run yet; returns at once."""
    _renderer.start()


def _single(dialect: Dialect, conversation: Conversation, what: str) -> dict[str, Any]:
    (answer,) = _renderer.ask(dialect, [conversation], what)
    if isinstance(answer, UserError):
        raise answer
    return answer


class _Renderer:
    """The process, and the exchange with it. One exchange at a time; whatever disturbs one ends the process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] | None = None
        self.owner = 0
        self.ready = False
        self.pending = b""
        self.used = 0.0
        self.unanswered = 0

    def ask(self, dialect: Dialect, conversations: Sequence[Conversation], what: str) -> list[Answer]:
        """An answer for each conversation: its fields, or its own fault."""
        with self.lock:
            answers: list[Answer] = []
            for batch in _batches(conversations):
                if isinstance(batch, UserError):
                    answers.append(batch)
                    continue
                try:
                    answers += self._exchange(dialect, *batch, what)
                except BaseException:
                    if self.unanswered:
                        self.stop()
                    raise
            return answers

    def start(self) -> None:
        """Start the process unless it runs. A fork has its parent's process only by name and starts its own."""
        idle = self.ready and time.monotonic() - self.used > IDLE_SECONDS
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None and not idle:
            return
        self.stop()
        package = str(Path(trainer.__file__).resolve().parent.parent)
        environment = {name: os.environ[name] for name in os.environ if name in KEPT or name.startswith("LC_")}
        paths = filter(None, [package, environment.get("PYTHONPATH")])
        environment |= {**SETTINGS, "PYTHONPATH": os.pathsep.join(paths)}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer.data.render_process"],  # -P: nothing is imported from the work folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.owner, self.ready, self.pending = os.getpid(), False, b""

    def stop(self) -> None:
        """End the process, whatever it does."""
        process, self.process = self.process, None
        if process is None:
            return
        if self.owner == os.getpid():
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, self.errors):
            if stream is not None:
                stream.close()

    def _exchange(
        self, dialect: Dialect, conversations: list[Conversation], lines: list[bytes], what: str
    ) -> Iterator[Answer]:
        self.start()
        if not self.ready:
            self.unanswered = 1
            answer = self._read(START_SECONDS)
            if answer is None or READY not in json.loads(answer):
                raise RunError(f"the process for chat templates does not start: {self._last_words()}")
            self.ready, self.used = True, time.monotonic()
        asked = {"what": what, "count": len(lines), "seconds": guard.RENDER_SECONDS, "dialect": asdict(dialect)}
        self.unanswered = len(lines)
        self._send(b"\n".join([json.dumps(asked).encode(), *lines, b""]))
        for conversation in conversations:
            line = self._read(CLOCK_SECONDS)
            if line is None:
                raise self._excess(conversation.place, out_of_memory=False)
            answer, self.unanswered = json.loads(line), self.unanswered - 1
            if answer.get("memory"):
                raise self._excess(conversation.place, out_of_memory=True)
            if answer.get("fault"):
                raise TokenizerFault(answer["error"])
            yield UserError(answer["error"]) if "error" in answer else answer
        self.used = time.monotonic()

    def _excess(self, place: str, out_of_memory: bool) -> TokenizerFault:
        """Why the process gave no answer to a conversation."""
        assert self.process is not None
        try:
            code = None if out_of_memory else self.process.wait(1)
        except subprocess.TimeoutExpired:
            code = -signal.SIGPROF  # it is alive and silent: as good as endless
        reason = f"ends its process (exit code {code}: {self._last_words()})"
        if code == -signal.SIGPROF:
            reason = f"runs for over {guard.RENDER_SECONDS:g} s"
        elif out_of_memory or code == -signal.SIGKILL:
            reason = f"takes over {guard.RENDER_BYTES >> 20} MiB of memory"
        return TokenizerFault(f"{place}: the chat template {reason}; mend `model.chat_template`")

    def _send(self, data: bytes) -> None:
        """Write a request; a process that ends meanwhile is seen when its answer is missed."""
        assert self.process is not None and self.process.stdin is not None
        view, pipe = memoryview(data), self.process.stdin.fileno()
        end = time.monotonic() + CLOCK_SECONDS
        while view:
            _, writable, _ = select.select([], [pipe], [], max(end - time.monotonic(), 0))
            if not writable:
                return
            try:
                view = view[os.write(pipe, view) :]
            except BrokenPipeError:
                return

    def _read(self, seconds: float) -> bytes | None:
        """The next line; None where the process ended, was silent for so long or says more than any answer can be."""
        assert self.process is not None and self.process.stdout is not None
        parts, pipe, end = [self.pending], self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in parts[-1]:
            readable, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0))
            data = os.read(pipe, 1 << 20) if readable else b""
            if not data or sum(map(len, parts)) > ANSWER_BYTES:
                return None
            parts.append(data)
        line, _, self.pending = b"".join(parts).partition(b"\n")
        return line

    def _last_words(self) -> str:
        assert self.errors is not None
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")


def _batches(
    conversations: Sequence[Conversation],
) -> Iterator[tuple[list[Conversation], list[bytes]] | UserError]:
    """Conversations with their lines, in order, in batches of BATCH_BYTES; one that cannot be sent is a fault."""
    batch: tuple[list[Conversation], list[bytes]] = [], []
    size = 0
    for conversation in conversations:
        line = _line(conversation)
        if batch[0] and (isinstance(line, UserError) or size + len(line) > BATCH_BYTES):
            yield batch
            batch, size = ([], []), 0
        if isinstance(line, UserError):
            yield line
            continue
        batch[0].append(conversation)
        batch[1].append(line)
        size += len(line)
    if batch[0]:
        yield batch


def _line(conversation: Conversation) -> bytes | UserError:
    """The conversation as one line of JSON, or why it cannot be rendered."""
    fields = {"place": conversation.place, "messages": conversation.messages, "tools": conversation.tools}
    try:
        line = json.dumps(fields, default=_placeholder).encode()
    except RecursionError:
        return UserError(f"{conversation.place}: nested too deep for a chat template; mend the row")
    if len(line) > guard.CONVERSATION_BYTES:
        limit = guard.CONVERSATION_BYTES >> 20
        return UserError(f"{conversation.place}: a conversation of {len(line) >> 20} MiB, at most {limit}; split it")
    return line


def _placeholder(value: Any) -> Any:
    """What transformers would show a template of a value that is not JSON: a number of numpy, else its type's name."""
    return value.item() if hasattr(value, "dtype") and hasattr(value, "item") else f"<{type(value).__name__}>"


_renderer = _Renderer()
atexit.register(_renderer.stop)
