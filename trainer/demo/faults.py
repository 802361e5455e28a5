"""Put known faults into clean tickets, so that data-quality work has a ground truth to be measured against."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trainer.demo import phrases
from trainer.demo.tickets import Ticket

EXACT_SHARE = 0.02
NEAR_SHARE = 0.05
LABEL_SHARE = 0.04
MOJIBAKE_SHARE = 0.01


@dataclass(frozen=True)
class Entry:
    """A ticket, the place of the clean ticket it came from, and its fault, if any.

    ``fault`` is ``exact`` (a copy), ``near`` (a copy with small edits), ``label`` (a clerk's mistake: ``field`` should
    be ``true_label``), ``mojibake`` (UTF-8 read as Windows-1252), or None.
    """

    ticket: Ticket
    origin: int
    fault: str | None = None
    field: str | None = None
    true_label: str | None = None


def injected(tickets: list[Ticket], source: random.Random) -> list[Entry]:
    """Give the tickets with wrong labels, mojibake and added duplicates, shuffled; at most one fault in an entry.

    Shares are of the number of entries returned; only clean tickets are repeated.
    """
    total = round(len(tickets) / (1 - EXACT_SHARE - NEAR_SHARE))
    places = list(range(len(tickets)))
    source.shuffle(places)
    entries = {place: Entry(tickets[place], place) for place in places}

    def take(share: float) -> list[int]:
        return [places.pop() for _ in range(round(share * total))]

    for place in take(LABEL_SHARE):
        entries[place] = mislabelled(entries[place], source)
    for place in take(MOJIBAKE_SHARE):
        entries[place] = Entry(garbled(tickets[place], source), place, "mojibake")
    copies = [Entry(tickets[place], place, "exact") for place in take(EXACT_SHARE)]
    copies += [Entry(nearly_same(tickets[place], source), place, "near") for place in take(NEAR_SHARE)]
    shuffled = [*entries.values(), *copies]
    source.shuffle(shuffled)
    return shuffled


def mislabelled(entry: Entry, source: random.Random) -> Entry:
    """Give the entry with a wrong team or a wrong priority."""
    field, options = source.choice((("team", phrases.TEAMS), ("priority", phrases.PRIORITIES)))
    true_label = getattr(entry.ticket.labels, field)
    wrong = source.choice([option for option in options if option != true_label])
    return Entry(entry.ticket.relabelled(**{field: wrong}), entry.origin, "label", field, true_label)


def garbled(ticket: Ticket, source: random.Random) -> Ticket:
    """Give the ticket as it looks when its UTF-8 bytes are read as Windows-1252; labels and order number survive."""
    text = ticket.text.replace("'", "\u2019").replace("...", "\u2026")
    if text.isascii():
        text += f" {source.choice([name for name in phrases.NAMES if not name.isascii()])}"
    return ticket.reworded("".join(_misread(byte) for byte in text.encode("utf-8")))


def _misread(byte: int) -> str:
    """Windows-1252 leaves five bytes undefined; browsers show those as the control characters of Latin-1."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


def nearly_same(ticket: Ticket, source: random.Random) -> Ticket:
    """Give the ticket sent once more with a small edit that changes no label."""
    text = ticket.text
    edits = (
        f"Resending this: {text}",
        f"{text} Please confirm.",
        text.replace(". ", "! ", 1) if ". " in text else f"{text} !",
        text.replace(" ", "  ", 2),
        f"{text[0].lower()}{text[1:]} ..." if text[0].isupper() else f"{text} ...",
    )
    return ticket.reworded(source.choice(edits))
