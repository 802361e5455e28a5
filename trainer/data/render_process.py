"""The process in which chat templates run: ``python -P -m trainer.data.render_process``; `renderer` starts it.

A template is a program of whoever published the model. transformers' sandbox keeps it from Python's internals and
limits neither time nor memory: `{{ 'x' * 10 ** 9 }}`, nested loops, a huge width in a format. So it runs here, where
memory has a limit, no file can be written (`guard.confine`) and no secret of the environment is at hand; and the kernel
ends the process, in the middle of an operation
in C if need be, once one conversation has taken `guard.RENDER_SECONDS` of CPU time. CPU time, since a template cannot
wait for anything: on a busy machine the clock would accuse the innocent. `renderer` watches the clock as well.

On standard input, a request: one line of JSON that says what is asked and of which template, and how many conversations
follow; then so many lines. On standard output, once all are read, a line for each as it is finished.
"""

from __future__ import annotations

import json
import select
import signal
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from trainer.config.errors import UserError
from trainer.data.guard import TokenizerFault, confine
from trainer.data.template import Chat, Conversation, Dialect

READY = "ready"
LONGEST_IDLE = 90.0  # seconds without a request, after which the process leaves and frees its memory


def main() -> int:
    """Serve requests until standard input ends, or is silent for long."""
    _warm_up()
    confine()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _write(answers, {READY: True})
    while select.select([requests], [], [], LONGEST_IDLE)[0] and (head := requests.readline()):
        asked = json.loads(head)
        conversations = [requests.readline() for _ in range(asked["count"])]
        chat = Chat(Dialect(**asked["dialect"]))
        while conversations:  # each is let go before it is rendered: memory is for the rendering
            signal.setitimer(signal.ITIMER_PROF, asked["seconds"])  # nothing handles SIGPROF, so it ends the process
            answer = _answer(chat, asked["what"], conversations.pop(0))
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(answer + b"\n")
            answers.flush()
    return 0


def _answer(chat: Chat, what: str, line: bytes) -> bytes:
    """What was asked of one conversation, as JSON; or `memory`, where there was not enough of it."""
    try:
        return json.dumps(_said(chat, what, line)).encode()
    except MemoryError:
        return b'{"memory": true}'


def _said(chat: Chat, what: str, line: bytes) -> dict[str, Any]:
    """`text` and `spans` (or, of a prompt, `reference`); or `error` and `fault`, whether it is the template's."""
    try:
        conversation = Conversation(**json.loads(line))
        if what == "prompt":
            text, reference = chat.prompt(conversation)
            return {"text": text, "reference": reference}
        if what == "whole":
            return {"text": chat.whole(conversation)}
        rendered = chat.rendered(conversation, what)
        return {"text": rendered.text, "spans": [list(asdict(span).values()) for span in rendered.spans]}
    except UserError as error:
        return {"error": str(error), "fault": isinstance(error, TokenizerFault)}
    except RecursionError:
        return {"error": "nested too deep for a chat template; mend the row", "fault": False}


def _warm_up() -> None:
    """Import what rendering needs, so that it counts as what is in use already."""
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    template = "{% generation %}{{ messages[1].content }}{% endgeneration %}"
    _answer(Chat(Dialect(template, {}, ())), "assistant", json.dumps({"place": "", "messages": turns}).encode())


def _write(stream: BinaryIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
