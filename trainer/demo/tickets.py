"""Compose one support ticket and its triage answer from the phrase banks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

from trainer.demo import phrases

SYSTEM_PROMPT = "Triage the ticket as JSON: team, priority, product, order."
FOREIGN_SHARE = 0.03
ORDER_SHARE = 0.75
SALES_ORDER_SHARE = 0.3  # who asks for a price seldom has an order yet
PRIORITY_WEIGHTS = {"high": 0.35, "normal": 0.35, "low": 0.30}


@dataclass(frozen=True)
class Labels:
    """What a triage clerk writes down; ``None`` where the message names no product or no order."""

    team: str
    priority: str
    product: str | None
    order: str | None

    def answer(self) -> str:
        """Give the compact JSON with the fixed key order team, priority, product, order."""
        fields = {"team": self.team, "priority": self.priority, "product": self.product, "order": self.order}
        return json.dumps(fields, separators=(",", ":"))


@dataclass(frozen=True)
class Ticket:
    """A customer's message, its true labels, its language, and the message with the order number masked."""

    text: str
    labels: Labels
    language: str
    skeleton: str

    def relabelled(self, **labels: str) -> Ticket:
        """Give this ticket with other labels, such as a clerk's mistake."""
        return replace(self, labels=replace(self.labels, **labels))

    def reworded(self, text: str) -> Ticket:
        """Give this ticket with another text of the same meaning."""
        return replace(self, text=text)


def compose(source: random.Random) -> Ticket:
    """Draw one ticket, in English or (3 %) in another language."""
    team = source.choice(phrases.TEAMS)
    priority = source.choices(list(PRIORITY_WEIGHTS), list(PRIORITY_WEIGHTS.values()))[0]
    share = SALES_ORDER_SHARE if team == "sales" else ORDER_SHARE
    order = f"A-{source.randrange(10_000, 100_000)}" if source.random() < share else None
    write = _foreign if source.random() < FOREIGN_SHARE else _english
    text, product, language = write(source, team, priority, order)
    skeleton = text
    if order:
        spelled = source.choices([order, f"#{order}", order.replace("-", "")], [0.8, 0.1, 0.1])[0]
        text, skeleton = text.replace("{order}", spelled), text.replace("{order}", "A-#####")
    return Ticket(text, Labels(team, priority, product, order), language, skeleton)


def _english(source: random.Random, team: str, priority: str, order: str | None) -> tuple[str, str | None, str]:
    problem = source.choice(phrases.PROBLEMS[team])
    product = source.choice(list(phrases.PRODUCTS)) if "{product}" in problem else None
    words = source.choice(phrases.PRODUCTS[product]) if product else ""
    problem = problem.replace("{product}", words).replace("{code}", f"E{source.randrange(1, 40):02d}")
    cue = source.choice(phrases.CUES[priority])
    mention = source.choice(phrases.ORDER_MENTIONS) if order else ""
    sentences = [sentence(problem), cue, source.choice(phrases.FILLERS), mention]
    tail = sentences[1:]
    source.shuffle(tail)
    opening = [cue] if cue and source.random() < 0.15 else []  # now and then the cue comes first
    body = opening + sentences[:1] + [part for part in tail if not (opening and part == cue)]
    body = [misspelled(source, part) if source.random() < 0.12 else part for part in body]
    text = " ".join(part for part in [source.choice(phrases.GREETINGS), *body] if part)
    return _framed(source, text), product, "en"


def _foreign(source: random.Random, team: str, priority: str, order: str | None) -> tuple[str, str | None, str]:
    language = source.choice(list(phrases.FOREIGN_PROBLEMS))
    problem = source.choice(phrases.FOREIGN_PROBLEMS[language][team])
    words = phrases.FOREIGN_PRODUCTS[language]
    product = source.choice(list(words)) if "{product}" in problem else None
    problem = sentence(
        problem.replace("{product}", words[product] if product else ""), "。" if language == "zh" else "."
    )
    parts = [problem, phrases.FOREIGN_CUES[language][priority], phrases.FOREIGN_ORDER[language] if order else ""]
    closing = source.choice([*phrases.NAMES, ""])
    return " ".join(part for part in [*parts, closing] if part), product, language


def sentence(text: str, stop: str = ".") -> str:
    """Give ``text`` with a capital and a full stop; questions get their mark."""
    text = text[0].upper() + text[1:]
    asks = ("do ", "does ", "is ", "can ", "will ", "when ", "which ")
    if text.endswith(("?", "？")):
        return text
    return text + ("?" if text.lower().startswith(asks) else stop)


def misspelled(source: random.Random, text: str) -> str:
    """Give ``text`` with one slip of the finger in one word: two letters swapped, one dropped, or one doubled."""
    words = text.split(" ")
    places = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not places:
        return text
    place = source.choice(places)
    word, at = words[place], source.randrange(1, len(words[place]) - 2)
    slips = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )
    words[place] = source.choice(slips)
    return " ".join(words)


def _framed(source: random.Random, text: str) -> str:
    """Put a quoted thread before, and a closing or a signature after, some of the messages."""
    if source.random() < 0.05:
        text = f"{source.choice(phrases.QUOTED)}\n{text}"
    closing, name = source.choice(phrases.CLOSINGS), source.choice(phrases.NAMES)
    if source.random() < 0.08:
        return f"{text}\n-- \n{name}, {source.choice(phrases.COMPANIES)}"
    if closing:
        return f"{text} {closing}" + (f", {name}" if source.random() < 0.4 else "")
    return text
