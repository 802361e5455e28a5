from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.measures import labels, resampling, significance, text

FINITE = st.floats(-100, 100).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20)


def simulated(seed: int, n: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Baseline and candidate of correlated examples; the true difference of the means is ``gain``."""
    generator = np.random.default_rng([seed, 1])  # a stream of its own: the resamples are drawn from `seed`
    hardness = generator.exponential(size=n)  # skewed, shared by both systems
    return hardness + generator.normal(size=n), hardness + gain + generator.normal(size=n)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_interval_covers_the_true_difference(method: resampling.Method) -> None:
    verdicts = [
        significance.paired_bootstrap(*simulated(seed, 60, 0.3), resamples=600, interval_method=method, seed=seed)
        for seed in range(500)
    ]
    covered = np.mean([verdict.low <= 0.3 <= verdict.high for verdict in verdicts])
    assert 0.90 <= covered <= 0.98


@pytest.mark.parametrize("test", [significance.paired_bootstrap, significance.paired_permutation])
def test_p_values_are_uniform_where_nothing_differs(test) -> None:
    p_values = np.array([test(*simulated(seed, 60, 0.0), resamples=400, seed=seed).p_value for seed in range(500)])
    assert 0.02 <= (p_values <= 0.05).mean() <= 0.09
    assert 0.40 <= (p_values <= 0.5).mean() <= 0.60


def test_a_real_gain_is_found_and_said_in_one_sentence() -> None:
    baseline, candidate = [0.0] * 90 + [1.0] * 10, [1.0] * 70 + [0.0] * 20 + [1.0] * 10
    verdict = significance.paired_bootstrap(baseline, candidate, metric="exact_match")
    assert (verdict.n, verdict.baseline, verdict.candidate) == (100, 0.1, 0.8)
    assert verdict.difference == pytest.approx(0.7)
    assert verdict.low == pytest.approx(0.7 - 1.96 * math.sqrt(0.7 * 0.3 / 100), abs=0.02)
    assert verdict.p_value == pytest.approx(1 / 10_001)
    assert verdict.better is True
    assert verdict.summary.startswith("exact_match: 0.8 against 0.1 for the baseline, higher by 0.7 (95% interval")
    assert verdict.summary.endswith("100 examples): better.")
    assert "\n" not in verdict.summary
    reverse = significance.paired_bootstrap(candidate, baseline)
    assert reverse.better is False and reverse.difference == pytest.approx(-0.7)
    assert significance.paired_bootstrap(candidate, baseline, lower_is_better=True).better is True


@pytest.mark.parametrize("test", [significance.paired_bootstrap, significance.paired_permutation, significance.mcnemar])
def test_degenerate_comparisons(test) -> None:
    equal = test([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (equal.difference, equal.p_value, equal.better) == (0.0, 1.0, None)
    assert "equal" in equal.summary and equal.summary.endswith("no difference shown.")
    single = test([0.0], [1.0])
    assert (single.p_value, single.better) == (1.0, None)
    assert single.summary.endswith("one example shows no spread, so no verdict.")
    with pytest.raises(UserError, match="0 examples"):
        test([], [])
    with pytest.raises(UserError, match="baseline values: 1 for 2 candidate values"):
        test([1.0], [1.0, 0.0])


def test_few_examples_never_claim_what_no_exact_test_could() -> None:
    # Five equal gains: every resample shows the same gain, but 2 of the 32 sign patterns are as extreme.
    verdict = significance.paired_bootstrap([0.0] * 5, [1.0] * 5)
    assert verdict.p_value == pytest.approx(2 / 32)
    assert verdict.better is None
    assert significance.paired_bootstrap([0.0] * 6, [1.0] * 6).better is True


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"candidate values\[1\]: nan"):
        significance.paired_bootstrap([1.0, 1.0], [1.0, math.nan])
    with pytest.raises(UserError, match="resamples: 5"):
        significance.paired_bootstrap([1.0], [1.0], resamples=5)
    with pytest.raises(UserError, match="confidence: 95"):
        significance.interval([1.0], confidence=95)
    with pytest.raises(UserError, match="interval method: 'basic'"):
        significance.interval([1.0], interval_method="basic")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="values: shape"):
        significance.interval([])
    with pytest.raises(UserError, match="examples: 0"):
        significance.paired_bootstrap_by_index(lambda indices: 0.0, lambda indices: 0.0, 0)
    with pytest.raises(UserError, match="not finite on"):
        significance.interval_by_index(lambda indices: math.nan, 3, resamples=100)
    with pytest.raises(UserError, match=r"candidate values\[0\]: 0.5"):
        significance.mcnemar([1.0], [0.5])
    with pytest.raises(UserError, match=r"denominators\[1\]: 0.0"):
        resampling.ratio_by_index([1.0, 1.0], [2.0, 0.0])


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_interval_agrees_with_scipy(method: resampling.Method) -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).exponential(size=40)
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    for found in (
        significance.interval(values, interval_method=method, resamples=20_000),
        significance.interval_by_index(
            lambda indices: values[indices].mean(), 40, interval_method=method, resamples=20_000
        ),
    ):
        assert found.value == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)  # the interval is 0.5 wide


def test_bca_counts_ties_half_as_scipy_does() -> None:
    from scipy.stats import bootstrap

    values = np.array([1.0] * 3 + [0.0] * 17)  # a quarter of the resamples tie with the mean
    expected = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    found = significance.interval(values, interval_method="bca", resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-9)


def test_ties_count_as_extreme_whatever_the_rounding() -> None:
    tenths = [-8, -9, -6, 6, 3, 8]  # in floats two of the 54 patterns miss the tie by the last bit
    sums = [sum(np.multiply(signs, tenths)) for signs in product((1, -1), repeat=6)]
    expected = sum(abs(value) >= abs(sum(tenths)) for value in sums) / 2**6
    found = significance.paired_permutation([0.0] * 6, [gain / 10 for gain in tenths])
    assert found.p_value == expected


def test_bca_leans_to_the_long_tail() -> None:
    values = np.random.default_rng(3).exponential(size=40)
    percentile, bca = (significance.interval(values, interval_method=method) for method in ("percentile", "bca"))
    assert bca.low > percentile.low and bca.high > percentile.high


def test_same_seed_same_verdict_and_bounded_draws() -> None:
    baseline, candidate = simulated(1, 80, 0.2)
    first, second = (significance.paired_bootstrap(baseline, candidate, seed=4) for _ in range(2))
    assert first == second
    assert significance.paired_bootstrap(baseline, candidate, seed=5).low != first.low
    shapes = [chunk.shape for chunk in resampling.draws(300_000, 10, seed=0)]
    assert shapes == [(3, 300_000)] * 3 + [(1, 300_000)]


def test_permutation_exact_by_hand() -> None:
    # Sums of the 8 sign patterns of 1, 2, 3: 6, 0, 2, -4, 4, -2, 0, -6. Two of them reach 6.
    assert significance.paired_permutation([0, 0, 0], [1, 2, 3]).p_value == pytest.approx(2 / 8)
    # 1, 2, -1 sums to 2: patterns of |sum| >= 2 are all but those of sum 0 (1-2+1 and its mirror).
    assert significance.paired_permutation([0, 0, 0], [1, 2, -1]).p_value == pytest.approx(6 / 8)


def test_random_permutation_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test

    baseline, candidate = simulated(11, 40, 0.2)
    expected = permutation_test(
        (candidate - baseline,),
        np.sum,
        permutation_type="samples",
        n_resamples=10_000,
        rng=np.random.default_rng(0),
    ).pvalue
    found = significance.paired_permutation(baseline, candidate)
    assert 0.005 < expected < 0.5
    assert found.p_value == pytest.approx(expected, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_swapping_the_systems_mirrors_the_verdict(pairs: list[tuple[float, float]]) -> None:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for test in (significance.paired_bootstrap, significance.paired_permutation):
        forward, back = test(first, second, resamples=200), test(second, first, resamples=200)
        assert 0.0 < forward.p_value <= 1.0
        assert forward.low <= forward.high
        assert back.p_value == pytest.approx(forward.p_value)
        assert (back.low, back.high, back.difference) == pytest.approx(
            (-forward.high, -forward.low, -forward.difference)
        )


def test_mcnemar_by_hand() -> None:
    # 8 gained, 1 lost, 91 the same: two-sided binomial 2 * (1 + 9) / 2**9.
    baseline = [0.0] * 8 + [1.0] + [1.0] * 91
    candidate = [1.0] * 8 + [0.0] + [1.0] * 91
    verdict = significance.mcnemar(baseline, candidate)
    assert verdict.p_value == pytest.approx(20 / 512)
    assert verdict.difference == pytest.approx(0.07)
    # Agresti and Min: cells 8.5 and 1.5 of 102; (7 -+ 1.96 sqrt(10 - 49/102)) / 102.
    reach = 1.959964 * math.sqrt(10 - 49 / 102)
    assert (verdict.low, verdict.high) == pytest.approx(((7 - reach) / 102, (7 + reach) / 102))
    assert verdict.better is True


def test_corpus_measures() -> None:
    references = [f"sentence number {i} says that it rains in town {i % 7}" for i in range(60)]
    good = [line if i % 3 else line.replace("rains", "snows") for i, line in enumerate(references)]
    bad = [line.replace("rains", "was sunny") for line in references]
    verdict = significance.paired_bootstrap_by_index(
        text.bleu_by_index(bad, references), text.bleu_by_index(good, references), 60, metric="bleu", resamples=500
    )
    assert verdict.baseline == pytest.approx(text.corpus_bleu(bad, references))
    assert verdict.candidate == pytest.approx(text.corpus_bleu(good, references))
    assert verdict.low < verdict.difference < verdict.high and verdict.better is True
    gold = [i % 4 for i in range(120)]
    guesses = [label if i % 5 else (label + 1) % 4 for i, label in enumerate(gold)]
    macro = significance.paired_bootstrap_by_index(
        labels.macro_f1_by_index(gold, gold),
        labels.macro_f1_by_index(guesses, gold),
        120,
        metric="macro_f1",
        resamples=500,
        interval_method="bca",
    )
    assert macro.baseline == 1.0 and macro.better is False


def test_loss_is_weighted_by_its_targets() -> None:
    loss = resampling.ratio_by_index([2.0, 30.0], [2.0, 10.0])
    assert loss(np.array([0, 1])) == pytest.approx(32 / 12)
    assert loss(np.array([0, 0])) == pytest.approx(1.0)
    perplexity = resampling.perplexity_by_index([2.0, 30.0], [2.0, 10.0])
    assert perplexity(np.array([0, 1])) == pytest.approx(math.exp(32 / 12))
    counts = [float(5 + i % 4) for i in range(50)]
    verdict = significance.paired_bootstrap_by_index(
        resampling.ratio_by_index([2.4 * count + i % 3 for i, count in enumerate(counts)], counts),
        resampling.ratio_by_index([2.0 * count + i % 3 for i, count in enumerate(counts)], counts),
        50,
        metric="loss",
        lower_is_better=True,
        resamples=200,
    )
    assert verdict.better is True and verdict.difference == pytest.approx(-0.4)


def test_coverage_of_a_corpus_measure() -> None:
    # Ratio of sums whose true value is known: each target's loss has mean 2, examples differ in length.
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng([seed, 1])
        counts = generator.integers(1, 20, size=60).astype(float)
        sums = generator.gamma(shape=2.0 * counts, scale=1.0)
        found = significance.interval_by_index(resampling.ratio_by_index(sums, counts), 60, resamples=200, seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 0.90 <= covered / 200 <= 0.98
