"""Corpora whose tokens are alike: how much is, in which runs, and the same for every run."""

import itertools

import numpy as np
import pytest

from foreshock.experiments.training.data import Corpus, DataConfig
from foreshock.experiments.training.repetition import REPETITIONS, repeated

LENGTH = 400_000


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(33, 127, size=LENGTH).astype(np.uint8)


def runs_of(alike):
    """Lengths of the stretches of True that end inside."""
    stretches = [(key, len(list(group))) for key, group in itertools.groupby(alike)]
    return [length for key, length in stretches[:-1] if key]


@pytest.mark.parametrize(
    ("repetition", "kinds", "shortest", "longest"),
    [("padding", {0}, 100, 600), ("white_space", {0x20, 0x0A}, 20, 200)],
)
def test_runs_of_the_named_lengths_take_35_percent(tokens, repetition, kinds, shortest, longest):
    made = repeated(tokens, repetition)
    alike = np.isin(made, list(kinds))
    runs = runs_of(alike)
    assert set(made[alike]) == kinds
    assert np.array_equal(made[~alike], tokens[~alike])
    assert shortest <= min(runs) < 1.1 * shortest and 0.95 * longest < max(runs) <= longest
    # the share of n runs and as many stretches between them, each with a standard deviation of 0.45 of its mean
    assert alike.mean() == pytest.approx(0.35, abs=4 * 0.35 * 0.65 * 0.45 * np.sqrt(2 / len(runs)))


def test_one_token_in_ten_of_white_space_is_a_newline(tokens):
    made = repeated(tokens, "white_space")
    white = made[made < 33]
    assert (white == 0x0A).mean() == pytest.approx(0.1, abs=5 * np.sqrt(0.09 / len(white)))


def test_a_document_of_the_corpus_comes_again_and_again(tokens):
    made = repeated(tokens, "document")
    assert np.array_equal(made[256:], made[:-256])
    assert bytes(made[:256]) in bytes(tokens)


@pytest.mark.parametrize("repetition", REPETITIONS)
def test_it_is_a_function_of_the_corpus_alone(tokens, repetition):
    made = repeated(tokens, repetition)
    assert made.dtype == tokens.dtype and made.shape == tokens.shape
    assert np.array_equal(made, repeated(tokens.copy(), repetition))


@pytest.mark.parametrize("repetition", REPETITIONS)
def test_a_short_corpus_keeps_its_length(repetition):
    assert len(repeated(np.arange(50, dtype=np.uint8), repetition)) == 50


@pytest.mark.parametrize("repetition", REPETITIONS)
def test_training_and_held_out_text_both_have_it(text, repetition):
    plain = Corpus(DataConfig("text", path=str(text)), 16)
    made = Corpus(DataConfig("text", path=str(text), repeats=repetition), 16)
    assert made.digest != plain.digest and made.vocab_size == plain.vocab_size
    for part in ("train", "held_out"):
        assert (getattr(made, part) != getattr(plain, part)).mean() > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "stdlib", "repeats": "pading"}, "data.repeats='pading' is not allowed: one of padding"),
        ({"source": "stdlib", "bpe_vocab_size": 300, "repeats": "padding"}, "needs bytes"),
        ({"source": "tokens", "path": "x", "vocab_size": 300, "repeats": "document"}, "needs bytes"),
    ],
)
def test_what_cannot_be_repeated_is_an_error_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**given)
