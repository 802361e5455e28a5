"""Measures of generated text against a reference: exact match, token F1, ROUGE, BLEU, chrF, distinct-n.

A function over (predictions, references) returns one value per example, or, where its name says ``corpus``, the one
value that the field defines over a whole corpus (BLEU and chrF sum their counts first: the mean of sentence scores
is another number). Shares run from 0 to 1; BLEU and chrF from 0 to 100, as sacrebleu prints them.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trainer.config.errors import UserError
from trainer.measures.pairs import check_pairs
from trainer.measures.tokens import WordTokenizer, ngrams, separate_unspaced, words

if TYPE_CHECKING:
    import numpy as np

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """``text`` without surrounding blanks and with every inner run of white space as one blank; case is kept."""
    return " ".join(text.split())


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 per example whose two texts are equal after ``normalise``, else 0.0."""
    check_pairs(predictions, references)
    return [
        float(normalise(prediction) == normalise(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _squad_tokens(text: str) -> list[str]:
    """Lower case, no punctuation, no English articles; characters where the script has no spaces."""
    text = text.lower().translate(_PUNCTUATION)
    separated = text if text.isascii() else separate_unspaced(text)
    if separated != text:
        text = "".join(mark for mark in separated if not unicodedata.category(mark).startswith("P"))
    return [token for token in text.split() if token not in _ARTICLES]


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 per example over the bag of tokens (Rajpurkar et al. 2016, SQuAD, section 6.1; its v2.0 evaluation script).

    Where either side has no tokens the value is 1.0 if both have none, else 0.0. Beyond the script, which knows
    English alone, a script without spaces is split into characters and the punctuation of such a text is dropped.
    """
    check_pairs(predictions, references)
    return [
        _bag_f1(_squad_tokens(prediction), _squad_tokens(reference))
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2.0 * shared / (len(prediction) + len(reference))


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    kinds: Sequence[str] = ROUGE_KINDS,
    *,
    stemmer: bool = False,
) -> dict[str, list[float]]:
    """F-measure per example for each of ``kinds`` (Lin 2004, ROUGE), computed by ``rouge_score``.

    On ASCII text these are its own numbers; other scripts are tokenised by ``tokens.words``. ``stemmer`` puts the
    Porter stemmer on English words. ``rougeLsum`` takes each line as a sentence. Raises UserError for another kind.
    """
    check_pairs(predictions, references)
    for kind in kinds:
        if kind not in (*ROUGE_KINDS, "rougeLsum") and not (kind[:5] == "rouge" and kind[5:] in tuple("123456789")):
            raise UserError(f"rouge: {kind!r}: give rouge1 to rouge9, rougeL or rougeLsum")
    from rouge_score.rouge_scorer import RougeScorer  # 1 to 2.5 s: it loads the whole of nltk

    scorer = RougeScorer(list(kinds), tokenizer=WordTokenizer(stemmer))
    scores = [
        scorer.score(reference, prediction) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {kind: [float(score[kind].fmeasure) for score in scores] for kind in kinds}


def rouge1(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-1 F-measure per example, without stemming."""
    return rouge(predictions, references, ("rouge1",))["rouge1"]


def rouge2(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-2 F-measure per example, without stemming."""
    return rouge(predictions, references, ("rouge2",))["rouge2"]


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F-measure per example (longest common subsequence over the whole text), without stemming."""
    return rouge(predictions, references, ("rougeL",))["rougeL"]


def bleu_tokenizer(references: Sequence[str]) -> str:
    """sacrebleu's tokenizer for the script of the references: ``zh``, ``char`` (Japanese, Thai ...) or ``13a``.

    ``13a`` splits at blanks, so a Chinese sentence would be one word and its BLEU zero.
    """
    tokens = [token for reference in references for token in words(reference)]
    unspaced = [token for token in tokens if separate_unspaced(token) != token]
    if 2 * len(unspaced) <= len(tokens):
        return "13a"
    han = sum("\u3400" <= token[0] <= "\u9fff" for token in unspaced)
    # Japanese prose mixes about as much kana as Han; Chinese has next to none.
    return "zh" if han > 0.9 * len(unspaced) else "char"


def _bleu(references: Sequence[str], tokenizer: str | None, **options: Any) -> Any:
    from sacrebleu.metrics.bleu import BLEU  # 0.3 s, and numpy with it

    known = ("13a", "zh", "char", "intl", "none")
    if tokenizer is not None and tokenizer not in known:
        raise UserError(f"bleu: tokenizer {tokenizer!r}: give one of {', '.join(known)}")
    return BLEU(tokenize=tokenizer or bleu_tokenizer(references), **options)


def _chrf(word_order: int) -> Any:
    from sacrebleu.metrics.chrf import CHRF  # 0.3 s, and numpy with it

    return CHRF(word_order=word_order)


def sentence_bleu(predictions: Sequence[str], references: Sequence[str], tokenizer: str | None = None) -> list[float]:
    """BLEU per example, 0 to 100, with exponential smoothing and effective order (sacrebleu's sentence form)."""
    check_pairs(predictions, references)
    metric = _bleu(references, tokenizer, effective_order=True)
    return [
        metric.sentence_score(prediction, [reference]).score
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def corpus_bleu(predictions: Sequence[str], references: Sequence[str], tokenizer: str | None = None) -> float:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018, sacrebleu). Raises UserError for an empty corpus.

    ``tokenizer`` None chooses by ``bleu_tokenizer``.
    """
    check_pairs(predictions, references, empty=False)
    return float(_bleu(references, tokenizer).corpus_score(list(predictions), [list(references)]).score)


def sentence_chrf(predictions: Sequence[str], references: Sequence[str], word_order: int = 0) -> list[float]:
    """chrF per example, 0 to 100 (Popović 2015); ``word_order`` 2 gives chrF++."""
    check_pairs(predictions, references)
    metric = _chrf(word_order)
    return [
        metric.sentence_score(prediction, [reference]).score
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def corpus_chrf(predictions: Sequence[str], references: Sequence[str], word_order: int = 0) -> float:
    """Corpus chrF, 0 to 100 (Popović 2015); ``word_order`` 2 gives chrF++. Raises UserError for an empty corpus."""
    check_pairs(predictions, references, empty=False)
    return float(_chrf(word_order).corpus_score(list(predictions), [list(references)]).score)


def _resampled(metric: Any, predictions: Sequence[str], references: Sequence[str]) -> Callable[[np.ndarray], float]:
    import numpy as np  # 0.1 s; this package imports without it

    # The n-gram counts of every example are extracted once: a resample then costs one sum, not one corpus of text.
    # sacrebleu's own significance tests go through these two methods.
    counts = np.asarray(metric._extract_corpus_statistics(list(predictions), [list(references)]))  # [examples, counts]
    return lambda indices: float(metric._compute_score_from_stats(counts[indices].sum(axis=0).tolist()).score)


def bleu_by_index(
    predictions: Sequence[str], references: Sequence[str], tokenizer: str | None = None
) -> Callable[[np.ndarray], float]:
    """Corpus BLEU of any resample, as a function of example indices [resampled examples]; for ``significance``."""
    check_pairs(predictions, references, empty=False)
    return _resampled(_bleu(references, tokenizer), predictions, references)


def chrf_by_index(predictions: Sequence[str], references: Sequence[str]) -> Callable[[np.ndarray], float]:
    """Corpus chrF of any resample, as a function of example indices [resampled examples]; for ``significance``."""
    check_pairs(predictions, references, empty=False)
    return _resampled(_chrf(0), predictions, references)


def distinct_n(predictions: Sequence[str], order: int = 2) -> list[float]:
    """Different n-grams over all n-grams, per text (Li et al. 2016, section 5.2); 0.0 for a text without any."""
    counts = [ngrams(words(prediction), order) for prediction in predictions]
    return [len(count) / count.total() if count else 0.0 for count in counts]


def corpus_distinct_n(predictions: Sequence[str], order: int = 2) -> float:
    """Different n-grams over all n-grams of the whole corpus (Li et al. 2016); 0.0 where there are none.

    Falls as the corpus grows: compare only corpora of one size.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for prediction in predictions:
        counts += ngrams(words(prediction), order)
    return len(counts) / counts.total() if counts else 0.0
