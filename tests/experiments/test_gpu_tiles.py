"""``experiments.gpu_tiles`` as far as a CPU shows it: what it would measure, and how it writes that down."""

import pytest
import torch

from foreshock.experiments import gpu_speed, gpu_tiles
from foreshock.experiments.gpu_speed import Case
from foreshock.experiments.gpu_tiles import Question, answer, questions
from foreshock.models.tiles import Tile
from tests.models.attention_in_triton import DEVICE


@pytest.mark.parametrize("question", list(questions()), ids=lambda question: question.name)
def test_the_pinned_tile_is_among_the_candidates(question):
    assert getattr(question.pinned, question.kernel) in question.candidates
    assert len(set(question.candidates)) == len(question.candidates)


@pytest.mark.triton
def test_the_fastest_comes_first_and_what_cannot_run_is_named(monkeypatch):
    slow, fast, wrong = Tile(16, 16, 4, 1), Tile(32, 16, 4, 1), Tile(64, 32, 4, 1)
    attend = gpu_tiles.triton_attention

    def too_large(q, k, v):
        raise torch.cuda.OutOfMemoryError("shared memory\n231424")

    def unless_wrong(numerics, tiles, device):
        return too_large if tiles.key_gradient == wrong else attend(numerics, tiles, device)

    def in_turns(calls):
        assert all(len(call()) == 3 for call in calls.values())  # dQ, dK, dV
        return {str(slow): 2.0, str(fast): 1.0}

    monkeypatch.setattr(gpu_speed, "TOKENS", 8)
    monkeypatch.setattr(gpu_speed, "HEADS", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_tiles, "triton_attention", unless_wrong)
    monkeypatch.setattr(gpu_tiles, "in_turns", in_turns)
    found = answer(Question("key_gradient", 16, (slow, wrong, fast), deterministic=False), Case(8, 16), DEVICE)
    assert list(found["ms"]) == [str(fast), str(slow)]
    assert found["missing"] == {str(wrong): "OutOfMemoryError: shared memory"}
    assert (found["ok"], found["of"], found["pinned"]) == (True, "forward and backward", str(Tile(64, 128, 8, 2)))
    monkeypatch.setattr(gpu_tiles, "in_turns", lambda calls: {})
    pinned = Question("key_gradient", 16, (Tile(64, 128, 8, 2),))
    monkeypatch.setattr(gpu_tiles, "triton_attention", lambda *_: too_large)
    assert not answer(pinned, Case(8, 16), DEVICE)["ok"]
