"""Words of a text in any script, for the measures that count words (ROUGE, distinct-n, token F1).

The tokenizers of the reference implementations know English alone: the one of ``rouge_score`` throws away every
letter outside a-z, so a Chinese pair scores zero however alike. Here a script written without spaces is split
into single characters and every other word is kept whole; on ASCII text the words are those of ``rouge_score``.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

# Scripts written without spaces between words.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


@functools.cache
def _word_pattern() -> Any:
    import regex  # 20 ms, and only the measures that count words need it; `re` knows no scripts

    # A character of an unspaced script with its marks, or a run of letters, marks and digits of any other script.
    return regex.compile(rf"(?V1)[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")


def words(text: str) -> list[str]:
    """Lower-cased words of ``text`` without punctuation; characters where the script has no spaces.

    On ASCII text equal to ``rouge_score.tokenize`` without its stemmer. Composed and decomposed letters (NFC) agree.
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text).lower())


def separate_unspaced(text: str) -> str:
    """``text`` with a blank on both sides of every character of a script that is written without spaces."""
    import regex  # 20 ms, see _word_pattern

    return regex.sub(rf"((?V1)[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*)", r" \1 ", text)


class WordTokenizer:
    """What ``rouge_score`` asks of a tokenizer: ``tokenize(text)``.

    With ``stemmer`` the Porter stem of ASCII words longer than three letters, as ``rouge_score`` does.
    """

    def __init__(self, stemmer: bool = False) -> None:
        self._stem: Callable[[str], str] | None = None
        if stemmer:
            from nltk.stem import porter  # 1 s: nltk loads its corpora readers; needed with the stemmer alone

            self._stem = porter.PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Words of ``text``, stemmed where this tokenizer stems."""
        found = words(text)
        if self._stem is None:
            return found
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in found]


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Counts of the runs of ``order`` tokens; empty where there are fewer tokens than that."""
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))
