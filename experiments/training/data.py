"""Real text as tokens: the corpus, its held-out split, and batches that are functions of (seed, step).

The default corpus is the running Python's own standard-library source, so every machine has one.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath

import numpy as np

from foreshock.experiments.training.repetition import REPETITIONS, repeated
from foreshock.faults.operation import Places

HELD_OUT_SEED = 2606_28116
"""Fixes the held-out and probe batches for every run, whatever its seed."""

SOURCES = ("stdlib", "text", "tokens")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. Every field is a key of ``conf/data/*.yaml``.

    source: ``stdlib`` (this Python's own source), ``text`` (a file, or a folder's files that match
    ``pattern``), or ``tokens`` (a nanoGPT ``.bin`` of uint16). path: for ``text`` and ``tokens``;
    bpe_vocab_size: train a byte-level BPE of that size on the corpus, or None for raw bytes;
    vocab_size: of a ``tokens`` file, whose vocabulary the file does not say;
    held_out: share of the corpus, taken from its end, that no training batch touches;
    repeats: what of a corpus of bytes is made alike (``experiments.training.repetition``), or None for
        the corpus as it is.
    """

    source: str
    path: str | None = None
    pattern: str = "*"
    bpe_vocab_size: int | None = None
    vocab_size: int | None = None
    held_out: float = 0.05
    repeats: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r} is not allowed: one of {', '.join(SOURCES)}")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"data.held_out={self.held_out} is not allowed: a share between 0 and 1")
        if (self.source == "stdlib") != (self.path is None):
            raise ValueError(
                f"data.path={self.path!r} with data.source={self.source!r}: "
                "'text' and 'tokens' need a path, 'stdlib' takes none"
            )
        if self.path is not None and not self.path.strip():
            raise ValueError(f"data.path={self.path!r} is not allowed: a file or folder, '.' for this one")
        pattern = PurePath(self.pattern)
        if not self.pattern.strip("./ ") or pattern.is_absolute() or ".." in pattern.parts:
            raise ValueError(
                f"data.pattern={self.pattern!r} is not allowed: names below data.path, such as '*.txt'; for one file "
                "give its name as data.path"
            )
        if (self.source == "tokens") != (self.vocab_size is not None):
            raise ValueError(
                f"data.vocab_size={self.vocab_size} with data.source={self.source!r}: "
                "'tokens' needs it, the others find it out"
            )
        if self.vocab_size is not None and not 2 <= self.vocab_size <= 65536:
            raise ValueError(f"data.vocab_size={self.vocab_size} is not allowed: 2 to 65536 (uint16 tokens)")
        if self.bpe_vocab_size is not None:
            if self.source == "tokens":
                raise ValueError("data.bpe_vocab_size has no effect on data.source='tokens': set it to null")
            if not 257 <= self.bpe_vocab_size <= 65536:
                raise ValueError(f"data.bpe_vocab_size={self.bpe_vocab_size} is not allowed: 257 to 65536, or null")
        if self.repeats is not None:
            if self.repeats not in REPETITIONS:
                raise ValueError(
                    f"data.repeats={self.repeats!r} is not allowed: one of {', '.join(REPETITIONS)}, or null"
                )
            if self.source == "tokens" or self.bpe_vocab_size is not None:
                raise ValueError(
                    f"data.repeats={self.repeats!r} needs bytes: data.source stdlib or text, data.bpe_vocab_size=null"
                )


def _python_source_files() -> list[Path]:
    """Every module of the standard library except its tests and installed packages, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]


def _text_files(config: DataConfig) -> list[Path]:
    if config.source == "stdlib":
        return _python_source_files()
    assert config.path is not None  # as DataConfig checks
    path = Path(config.path)
    if not path.exists():
        raise FileNotFoundError(f"data.path={config.path!r} does not exist")
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob(config.pattern) if file.is_file())


def _bpe_ids(files: Iterable[Path], vocab_size: int) -> np.ndarray:
    """Train a byte-level BPE on the files and encode them with it."""
    from tokenizers import ByteLevelBPETokenizer

    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    return np.concatenate([np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])


def _load_tokens(config: DataConfig) -> tuple[np.ndarray, int]:
    """The whole corpus as one row of tokens, and its vocabulary size."""
    tokens: np.ndarray
    if config.source == "tokens":
        assert config.path is not None and config.vocab_size is not None  # as DataConfig checks
        path = Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"data.path={config.path!r} is not a file of uint16 tokens")
        if path.stat().st_size % 2:
            raise ValueError(f"data.path={config.path!r} has an odd number of bytes: not uint16 tokens")
        tokens = np.memmap(path, dtype="<u2", mode="r") if path.stat().st_size else np.empty(0, np.uint16)
        if len(tokens) and int(tokens.max()) >= config.vocab_size:
            raise ValueError(
                f"data.vocab_size={config.vocab_size} is too small: {config.path!r} holds token {int(tokens.max())}"
            )
        return tokens, config.vocab_size
    files = _text_files(config)
    if not files:
        raise FileNotFoundError(f"data.path={config.path!r} holds no file that matches data.pattern={config.pattern!r}")
    if config.bpe_vocab_size is not None:
        return _bpe_ids(files, config.bpe_vocab_size), config.bpe_vocab_size
    tokens = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
    return (tokens if config.repeats is None else repeated(tokens, config.repeats)), 256


class Corpus:
    """Tokens in memory (or mapped), split once into a training part and a held-out tail.

    ``digest`` is the SHA-256 of the tokens, so that two machines with another standard library
    know that their runs differ.
    """

    def __init__(self, config: DataConfig, context_length: int) -> None:
        self.config, self.context_length = config, context_length
        tokens, self.vocab_size = _load_tokens(config)
        split = len(tokens) - int(len(tokens) * config.held_out)
        self.train, self.held_out = tokens[:split], tokens[split:]
        for name, part in (("training", self.train), ("held-out", self.held_out)):
            if len(part) < context_length + 2:
                where = config.path or "the standard library"
                raise ValueError(
                    f"data: the {name} part of {where!r} has {len(part)} tokens, "
                    f"too short for model.context_length={context_length}"
                )
        self.digest = hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()

    @property
    def places(self) -> Places:
        """Where a training sequence can begin."""
        return Places(len(self.train) - self.context_length, self.context_length)

    def starts(self, seed: int, step: int, size: int) -> np.ndarray:
        """Where the sequences of ``batch`` begin in the training part: (size,) int64."""
        return self._starts(self.train, (seed, step), size)

    def sequences(self, starts: np.ndarray) -> np.ndarray:
        """The training sequences that begin there, (..., context_length + 1) int64 tokens from (...)."""
        return self._sequences(self.train, starts)

    def _starts(self, part: np.ndarray, draw: tuple[int, int], count: int) -> np.ndarray:
        """Where the sequences of a draw begin; the generator is ``np.random.default_rng``'s, at half its overhead."""
        generator = np.random.Generator(np.random.PCG64(draw))
        starts: np.ndarray = generator.integers(0, len(part) - self.context_length, size=count)
        return starts

    def _sequences(self, part: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """(..., context_length + 1) int64 tokens from each start, (...)."""
        windows = np.lib.stride_tricks.sliding_window_view(part, self.context_length + 1)
        sequences: np.ndarray = windows[starts].astype(np.int64)
        return sequences

    def batch(self, seed: int, step: int, size: int) -> np.ndarray:
        """The batch of this seed and step: (size, context_length + 1) int64 tokens.

        A pure function; a smaller ``size`` gives the first sequences of the larger batch.
        """
        batch: np.ndarray = self.batches((seed,), step, size)[0]
        return batch

    def batches(self, seeds: Sequence[int], step: int, size: int) -> np.ndarray:
        """``batch`` of each seed, gathered at once: (seeds, size, context_length + 1)."""
        return self._sequences(self.train, np.stack([self._starts(self.train, (seed, step), size) for seed in seeds]))

    def held_out_batch(self, size: int) -> np.ndarray:
        """The label batch, the same for every run: (size, context_length + 1)."""
        return self._sequences(self.held_out, self._starts(self.held_out, (HELD_OUT_SEED, 0), size))

    def probe_batch(self, size: int) -> np.ndarray:
        """A frozen held-out batch for probe monitors, disjoint in its draw from the label batch."""
        return self._sequences(self.held_out, self._starts(self.held_out, (HELD_OUT_SEED, 1), size))


@cache
def load_once(config: DataConfig, context_length: int) -> Corpus:
    """The corpus, read once in a process: for sweeps, where reading it would take longer than building a run."""
    return Corpus(config, context_length)
