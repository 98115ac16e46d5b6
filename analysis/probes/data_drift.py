"""Two samples of training data: are their documents draws of one distribution?

A document is a line of a file, or a file of a folder. Four statistics, each against the permutation null that old and
new documents are exchangeable, Holm over the four:

- bytes: total variation distance of the two byte histograms, half the sum of |p - q|;
- length: mean bytes a document, new less old;
- compression: mean of zlib's compressed over plain size, new less old;
- repeats: share of documents that stand in the sample before, new less old.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]  # it has no stubs

from foreshock.analysis.probes.evaluation import contents
from foreshock.analysis.probes.step import Step, judged

NAME = "data drift"
MOST_DOCUMENTS = 1000
"""Of each sample; more are drawn from without replacement, by a fixed seed."""
RESAMPLES = 1999
FEWEST = 5
"""Documents of a sample, below which a permutation can show nothing."""


def compare(old: Path, new: Path, alpha: float) -> Step:
    """Raises ValueError for a path that does not exist, or has fewer than ``FEWEST`` documents."""
    before, after = documents(old, "old_data"), documents(new, "new_data")
    findings, notes = drift(before, after, alpha)
    compared = f"{len(before):,} documents of {old} with {len(after):,} of {new}"
    return judged(NAME, compared, findings, tuple(notes))


def documents(path: Path, key: str) -> list[bytes]:
    """Not empty ones: the lines of a file, or the files of a folder."""
    files = contents(path, key)
    parts = files["it"].splitlines() if path.is_file() else list(files.values())
    kept = [part for part in parts if part.strip()]
    if len(kept) < FEWEST:
        raise ValueError(f"{key}={path} has {len(kept)} documents: at least {FEWEST} are needed")
    return kept


def drift(old: Sequence[bytes], new: Sequence[bytes], alpha: float) -> tuple[list[str], list[str]]:
    """Which statistics differ at ``alpha``, Holm over all, and a note for each of the others."""
    rng = np.random.default_rng(0)
    old, new = _drawn(old, rng), _drawn(new, rng)
    both, first = [*old, *new], len(old)
    counts = np.stack([np.bincount(np.frombuffer(part, np.uint8), minlength=256) for part in both]).astype(float)
    lengths = counts.sum(1)
    packed = np.array([len(zlib.compress(part)) for part in both]) / lengths
    known = {
        "bytes": (_distance(counts), "greater", "total variation {:.3f}"),
        "length": (_mean(lengths), "two-sided", "{:+.1f} bytes a document"),
        "compression": (_mean(packed), "two-sided", "{:+.3f} of zlib's ratio"),
        "repeats": (_repeats(both), "two-sided", "{:+.3f} of documents"),
    }
    ids = np.arange(len(both))
    tests = {
        name: permutation_test(
            (ids[:first], ids[first:]),
            statistic,
            permutation_type="independent",
            n_resamples=RESAMPLES,
            alternative=alternative,
            vectorized=True,
            rng=np.random.default_rng(1),
        )
        for name, (statistic, alternative, _) in known.items()
    }
    rejected, adjusted, *_ = multipletests([test.pvalue for test in tests.values()], alpha, method="holm")
    said = [
        f"{name} {known[name][2].format(test.statistic)}, p = {p:.2g} after Holm"
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    ]
    pairs = list(zip(said, rejected, strict=True))
    return [text for text, found in pairs if found], [text for text, found in pairs if not found]


def _drawn(parts: Sequence[bytes], rng: np.random.Generator) -> list[bytes]:
    if len(parts) <= MOST_DOCUMENTS:
        return list(parts)
    return [parts[i] for i in np.sort(rng.choice(len(parts), MOST_DOCUMENTS, replace=False))]


Statistic = Callable[..., np.ndarray]
"""Of numbers of documents, old and new, along the last axis: many permutations at a time, one a row."""


def _distance(counts: np.ndarray) -> Statistic:
    """counts: of every byte in every document, (documents, 256)."""

    def shares(chosen: np.ndarray) -> np.ndarray:
        is_chosen = np.zeros((*chosen.shape[:-1], len(counts)))
        np.put_along_axis(is_chosen, chosen, 1.0, axis=-1)
        totals = is_chosen @ counts
        return totals / totals.sum(-1, keepdims=True)

    return lambda x, y, axis: 0.5 * np.abs(shares(x) - shares(y)).sum(-1)


def _mean(values: np.ndarray) -> Statistic:
    return lambda x, y, axis: values[y].mean(-1) - values[x].mean(-1)


def _repeats(parts: Sequence[bytes]) -> Statistic:
    """A document is a repeat where the same bytes are in the same sample once more."""
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(part, i) for i, part in enumerate(parts)])

    def share(chosen: np.ndarray) -> np.ndarray:
        in_order = np.sort(same[chosen], axis=-1)
        return (np.diff(in_order, axis=-1) == 0).sum(-1) / chosen.shape[-1]

    return lambda x, y, axis: share(y) - share(x)
