"""Corpora whose tokens are alike: padding, white space, one document again and again.

Real corpora hold all three. Rounding errors of equal tokens are equal, so predictions that take tokens as independent
meet their hardest cases here.
"""

from __future__ import annotations

import numpy as np

REPETITIONS = ("padding", "white_space", "document")

SEED = 2606_28116
"""Fixes the places of what is repeated, for every run alike."""

SHARE = 0.35
"""Of the corpus, what padding and white space take."""

PADDING, SPACE, NEWLINE = 0, 0x20, 0x0A
DOCUMENT_TOKENS = 256
PADDING_RUN, WHITE_SPACE_RUN = (100, 600), (20, 200)
"""Shortest and longest run, in tokens; lengths in between are equally likely."""

NEWLINES = 0.1
"""Share of newlines in white space; the rest are spaces."""


def repeated(tokens: np.ndarray, repetition: str) -> np.ndarray:
    """A corpus of bytes with one of ``REPETITIONS`` in it, of the same length, a function of its arguments alone.

    ``padding``: runs of 100 to 600 zero bytes in place of 35 % of the text; ``white_space``: runs of 20 to 200 spaces,
    one in ten of them a newline, in place of as much; ``document``: 256 bytes of the corpus, again and again.
    tokens: (N,) bytes; returns (N,) of the same dtype. Raises ValueError for another repetition.
    """
    generator = np.random.default_rng((SEED, len(tokens)))
    if repetition == "document":
        first = int(generator.integers(0, max(1, len(tokens) - DOCUMENT_TOKENS)))
        return np.resize(tokens[first : first + DOCUMENT_TOKENS], len(tokens))
    if repetition == "padding":
        return np.where(_runs(generator, len(tokens), *PADDING_RUN), tokens.dtype.type(PADDING), tokens)
    if repetition == "white_space":
        newline = generator.random(len(tokens)) < NEWLINES
        space = np.where(newline, NEWLINE, SPACE).astype(tokens.dtype)
        return np.where(_runs(generator, len(tokens), *WHITE_SPACE_RUN), space, tokens)
    raise ValueError(f"data.repeats={repetition!r} is not allowed: one of {', '.join(REPETITIONS)}, or null")


def _runs(generator: np.random.Generator, length: int, shortest: int, longest: int) -> np.ndarray:
    """(length,): True in runs that take ``SHARE`` of all, between stretches of False as varied in length."""
    text_per_run = (1 - SHARE) / SHARE
    pairs = 1 + int(length / (shortest * (1 + text_per_run)))
    run = generator.integers(shortest, longest + 1, size=pairs)
    between = np.rint(text_per_run * generator.integers(shortest, longest + 1, size=pairs)).astype(np.int64)
    stretches = np.stack((between, run), axis=1).ravel()
    return np.repeat(np.tile([False, True], pairs), stretches)[:length]
