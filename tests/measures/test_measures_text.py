from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.measures import text
from trainer.measures.tokens import WordTokenizer, words

ASCII = st.text(st.characters(max_codepoint=127), max_size=60)


def test_exact_match_ignores_blanks_but_not_case() -> None:
    assert text.exact_match([" a  b\n", "A b", ""], ["a b", "a b", " "]) == [1.0, 0.0, 1.0]


def test_unequal_lengths_are_the_users_error() -> None:
    for measure in (text.exact_match, text.token_f1, text.rouge, text.corpus_bleu, text.corpus_chrf):
        with pytest.raises(UserError, match="predictions: 1 for 2 references"):
            measure(["a"], ["a", "b"])


def test_token_f1_follows_the_squad_script() -> None:
    # {cat, sat} against {cat, sat, down}: precision 1, recall 2/3.
    assert text.token_f1(["The cat sat!"], ["a cat sat down"]) == pytest.approx([0.8])
    # Nothing but articles and punctuation on one side, and on both.
    assert text.token_f1(["the.", "the.", "x"], ["x", "a", ""]) == [0.0, 1.0, 0.0]
    # A bag, not a set: two of three.
    assert text.token_f1(["go go go"], ["go go stop"]) == pytest.approx([2 / 3])


def test_token_f1_splits_chinese_characters() -> None:
    # 4 of 5 characters on either side; the full stop does not count.
    assert text.token_f1(["房间很干净。"], ["房间不干净"]) == pytest.approx([0.8])


@given(ASCII)
def test_words_of_ascii_text_are_those_of_rouge_score(sample: str) -> None:
    from rouge_score.tokenize import tokenize

    assert words(sample) == tokenize(sample, None)


def test_words_of_other_scripts() -> None:
    assert words("Größe café NAÏVE_x") == ["größe", "café", "naïve", "x"]
    assert words("cafe\u0301") == ["café"]
    assert words("我爱GPU计算 2024年") == ["我", "爱", "gpu", "计", "算", "2024", "年"]
    assert (
        words("コーヒー") == ["コ", "ー", "ヒ", "ー"]
        or words("コーヒー") == ["コ", "ーヒー"]
        or len(words("コーヒー")) >= 3
    )
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("\u3002... !") == []


def test_rouge_by_hand() -> None:
    scores = text.rouge(["the cat sat on the mat"], ["the cat lay on the mat"])
    assert scores["rouge1"] == pytest.approx([5 / 6])
    assert scores["rouge2"] == pytest.approx([3 / 5])  # the-cat, on-the, the-mat
    assert scores["rougeL"] == pytest.approx([5 / 6])
    # Out of order: the common subsequence shrinks, the bag of words does not.
    assert text.rouge1(["b a"], ["a b"]) == [1.0]
    assert text.rouge_l(["b a"], ["a b"]) == [0.5]


def test_rouge_is_the_reference_implementations_on_english() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    prediction, reference = (
        "Running models quickly; it's the runner's 2nd try.",
        "The runners ran the models quickly, twice.",
    )
    for stemmer in (False, True):
        expected = RougeScorer(list(text.ROUGE_KINDS), use_stemmer=stemmer).score(reference, prediction)
        found = text.rouge([prediction], [reference], stemmer=stemmer)
        assert {kind: values[0] for kind, values in found.items()} == pytest.approx(
            {kind: score.fmeasure for kind, score in expected.items()}
        )
    assert WordTokenizer(stemmer=True).tokenize("running the cats") == ["run", "the", "cat"]


def test_rouge_of_chinese_is_not_zero() -> None:
    scores = text.rouge(["房间很干净"], ["房间不干净"])
    assert scores["rouge1"] == pytest.approx([4 / 5])
    assert scores["rouge2"] == pytest.approx([2 / 4])
    assert scores["rougeL"] == pytest.approx([4 / 5])


def test_unknown_rouge_kind() -> None:
    with pytest.raises(UserError, match="'rouge0'"):
        text.rouge(["a"], ["a"], ("rouge0",))


def test_bleu_by_hand() -> None:
    # Matches 5/6, 3/5, 1/4, and smoothed 1/(2*3) for the 4-grams; equal lengths, so no brevity penalty.
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert text.corpus_bleu(["the cat sat on the mat"], ["the cat lay on the mat"]) == pytest.approx(expected)


def test_bleu_sums_counts_over_the_corpus() -> None:
    predictions, references = ["a b c d e", "x y"], ["a b c d e", "p q"]
    assert text.sentence_bleu(predictions, references) == pytest.approx([100.0, 0.0])
    corpus = text.corpus_bleu(predictions, references)
    assert corpus == pytest.approx(100 * (5 / 7 * 4 / 5 * 3 / 3 * 2 / 2) ** 0.25)
    assert corpus != pytest.approx(50.0)


def test_bleu_of_chinese_counts_characters() -> None:
    predictions, references = ["房间很干净服务也好"], ["房间很干净服务不好"]
    assert text.bleu_tokenizer(references) == "zh"
    assert text.corpus_bleu(predictions, references) > 50
    assert text.corpus_bleu(predictions, references, tokenizer="13a") == 0.0
    assert text.bleu_tokenizer(["私はコーヒーが好きです"]) == "char"
    assert text.bleu_tokenizer(["The word 好 means good"]) == "13a"
    with pytest.raises(UserError, match="'16b'"):
        text.corpus_bleu(["a"], ["a"], tokenizer="16b")


def test_chrf() -> None:
    import sacrebleu

    predictions, references = ["the cat sat", "no"], ["the cat sits", "yes"]
    assert text.corpus_chrf(predictions, references) == pytest.approx(
        sacrebleu.corpus_chrf(predictions, [references]).score
    )
    assert text.sentence_chrf(["same", "no"], ["same", "yes"]) == pytest.approx([100.0, 0.0])
    assert text.corpus_chrf(predictions, references, word_order=2) != text.corpus_chrf(predictions, references)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_resampled_corpus_measures_equal_the_measure_of_the_resample(chosen: list[int]) -> None:
    predictions = ["the cat sat on the mat", "a dog", "rain again today in town", "", "x", "one two three four five"]
    references = ["the cat lay on the mat", "a dog barks", "it rains again in town", "y", "x", "one two three four six"]
    resample = [predictions[i] for i in chosen], [references[i] for i in chosen]
    tokenizer = "13a"
    by_index = text.bleu_by_index(predictions, references, tokenizer)
    assert by_index(np.array(chosen)) == pytest.approx(text.corpus_bleu(*resample, tokenizer=tokenizer))
    assert text.chrf_by_index(predictions, references)(np.array(chosen)) == pytest.approx(text.corpus_chrf(*resample))


def test_empty_corpus_has_no_corpus_value() -> None:
    for measure in (text.corpus_bleu, text.corpus_chrf, text.bleu_by_index):
        with pytest.raises(UserError, match="0 examples"):
            measure([], [])


def test_distinct_n() -> None:
    assert text.distinct_n(["a b a b", "", "a b c"], 2) == pytest.approx([2 / 3, 0.0, 1.0])
    # Bigrams: ab, ba, ab, ab, bc: three different of five.
    assert text.corpus_distinct_n(["A b a b", "", "a b c"], 2) == pytest.approx(3 / 5)
    assert text.corpus_distinct_n([], 1) == 0.0
    assert text.distinct_n(["好好好"], 1) == pytest.approx([1 / 3])


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_shares_are_bounded_symmetric_and_one_for_equal_texts(left: str, right: str) -> None:
    value = text.token_f1([left], [right])[0]
    assert 0.0 <= value <= 1.0
    assert value == text.token_f1([right], [left])[0]
    assert text.token_f1([left], [left]) == [1.0]
    assert text.exact_match([left], [left]) == [1.0]
    assert 0.0 <= text.rouge1([left], [right])[0] <= 1.0
