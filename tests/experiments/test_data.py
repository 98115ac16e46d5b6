import numpy as np
import pytest

from foreshock.experiments.training.data import Corpus, DataConfig

CONTEXT = 16


@pytest.fixture
def corpus(text):
    return Corpus(DataConfig("text", path=str(text)), CONTEXT)


def test_a_batch_is_a_function_of_seed_and_step(corpus):
    batch = corpus.batch(3, 5, 8)
    assert batch.shape == (8, CONTEXT + 1)
    assert np.array_equal(batch, corpus.batch(3, 5, 8))
    assert not np.array_equal(batch, corpus.batch(3, 6, 8))
    assert not np.array_equal(batch, corpus.batch(4, 5, 8))


def test_batches_are_those_of_numpys_default_generator_for_each_seed_and_step(corpus):
    starts = [np.random.default_rng((seed, 5)).integers(0, len(corpus.train) - CONTEXT, size=8) for seed in (3, 0, 7)]
    expected = [[corpus.train[start : start + CONTEXT + 1] for start in own] for own in starts]
    batches = corpus.batches((3, 0, 7), 5, 8)
    assert batches.dtype == np.int64 and np.array_equal(batches, expected)
    assert np.array_equal(batches[2], corpus.batch(7, 5, 8))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_smaller_batch_is_the_first_sequences_of_the_larger(corpus, size):
    assert np.array_equal(corpus.batch(0, 9, size), corpus.batch(0, 9, 8)[:size])


def test_sequences_are_stretches_of_the_text(corpus, text):
    raw = text.read_bytes()
    assert all(bytes(row.astype(np.uint8)) in raw for row in corpus.batch(0, 0, 4))


def test_training_never_sees_the_held_out_tail(text):
    config = DataConfig("text", path=str(text), held_out=0.5)
    corpus = Corpus(config, CONTEXT)
    marked = Corpus(config, CONTEXT)
    marked.train = np.zeros_like(corpus.train)
    assert not marked.batch(0, 0, 64).any()
    assert marked.held_out_batch(8).any()
    assert len(corpus.train) + len(corpus.held_out) == text.stat().st_size


def test_the_label_and_probe_batches_are_frozen_and_differ(corpus, text):
    again = Corpus(DataConfig("text", path=str(text)), CONTEXT)
    assert np.array_equal(corpus.held_out_batch(8), again.held_out_batch(8))
    assert np.array_equal(corpus.probe_batch(8), again.probe_batch(8))
    assert not np.array_equal(corpus.held_out_batch(8), corpus.probe_batch(8))


def test_the_default_corpus_is_this_pythons_own_source():
    corpus = Corpus(DataConfig("stdlib"), 64)
    assert corpus.vocab_size == 256
    assert len(corpus.train) > 5_000_000
    assert b"import" in bytes(corpus.train[:100_000])


def test_the_digest_changes_with_one_byte(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[:-1] + b"?")
    digests = {Corpus(DataConfig("text", path=str(p)), CONTEXT).digest for p in (text, other)}
    assert len(digests) == 2


def test_a_folder_is_read_in_a_fixed_order_and_by_pattern(tmp_path):
    for name, letter in (("b.txt", b"b"), ("a.txt", b"a"), ("c.md", b"c")):
        (tmp_path / name).write_bytes(letter * 400)
    corpus = Corpus(DataConfig("text", path=str(tmp_path), pattern="*.txt"), CONTEXT)
    assert bytes(np.concatenate((corpus.train, corpus.held_out))) == b"a" * 400 + b"b" * 400


def test_a_nanogpt_file_of_uint16_tokens(tmp_path):
    path = tmp_path / "train.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    corpus = Corpus(DataConfig("tokens", path=str(path), vocab_size=1000), CONTEXT)
    row = corpus.batch(0, 0, 1)[0]
    assert np.array_equal(row, np.arange(row[0], row[0] + CONTEXT + 1))


def test_a_bpe_is_trained_on_the_text(text):
    plain = Corpus(DataConfig("text", path=str(text)), CONTEXT)
    bpe = Corpus(DataConfig("text", path=str(text), bpe_vocab_size=300), CONTEXT)
    assert bpe.vocab_size == 300
    assert len(bpe.train) < len(plain.train)
    assert max(bpe.train) > 255


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: DataConfig("text", path=str(p / "no")), "does not exist"),
        (lambda p: DataConfig("text", path=str(p), pattern="*.none"), "holds no file that matches"),
        (lambda p: DataConfig("text", path=str(p / "empty")), "has 0 tokens"),
        (lambda p: DataConfig("text", path=str(p / "short")), "too short for model.context_length=16"),
        (lambda p: DataConfig("tokens", path=str(p / "odd"), vocab_size=10), "odd number of bytes"),
        (lambda p: DataConfig("tokens", path=str(p / "short"), vocab_size=10), "vocab_size=10 is too small"),
        (lambda p: DataConfig("tokens", path=str(p), vocab_size=10), "not a file of uint16"),
        (lambda p: DataConfig("web"), "data.source='web'"),
        (lambda p: DataConfig("stdlib", path="x"), "'stdlib' takes none"),
        (lambda p: DataConfig("text"), "need a path"),
        (lambda p: DataConfig("tokens", path="x"), "'tokens' needs it"),
        (lambda p: DataConfig("stdlib", held_out=1.0), "data.held_out=1.0"),
        (lambda p: DataConfig("stdlib", bpe_vocab_size=256), "257 to 65536"),
    ],
)
def test_impossible_data_is_an_error_by_name(tmp_path, make, message):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"abcdefgh" * 4)
    (tmp_path / "odd").write_bytes(b"abc")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Corpus(make(tmp_path), CONTEXT)
