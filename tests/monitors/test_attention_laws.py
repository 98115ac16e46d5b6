"""The laws watched in training: quiet on a healthy kernel, broken at the first faulty step in the very head alone."""

import numpy as np
import pytest

from foreshock.experiments import trace
from foreshock.experiments.training.loop import train
from foreshock.monitors.attention_laws import LAWS, AttentionLaws

pytestmark = pytest.mark.numeric

RATIOS = [f"{law}.over_noise" for law in LAWS]
EVERY_STEP = ["monitor.attention_laws.every_steps=1", "monitor.attention_laws.rows=0", "train.steps=30"]


@pytest.fixture
def readings(make_run, tmp_path):
    """By signal, (steps, layers, heads), of a tiny run with every row looked at in every step."""

    def run(*overrides: str) -> dict[str, np.ndarray]:
        made = make_run(*EVERY_STEP, *overrides)
        train(made, tmp_path)
        signals = trace.read(tmp_path / made.run_id).signals
        return {name: signals[name].values for name in (*LAWS, *RATIOS) if name in signals}

    return run


def test_a_healthy_run_stands_at_its_prediction(readings):
    healthy = readings()
    for name in RATIOS:
        assert healthy[name].shape == (30, 2, 2)
        assert 0.75 < np.sqrt(np.mean(healthy[name] ** 2)) < 1.3, name
        assert healthy[name].max() < 3, name


def test_three_bits_in_one_head_are_felt_there_at_the_first_faulty_step_and_nowhere_else(readings):
    where = ["fault.layers=[1]", "fault.heads=[0]", "fault.onset=10"]
    faulty = readings("fault=bf16_shift", "fault.sites=[o]", "fault.bits=3", *where)
    key_shift = faulty["key_shift_residual.over_noise"]
    assert (key_shift[10:, 1, 0] > 3).all()
    key_shift[10:, 1, 0] = 1
    assert key_shift.max() < 3
    assert all(faulty[name].max() < 3 for name in RATIOS if not name.startswith("key_shift"))


GROUPED = ["model=gqa_nano", "model.n_heads=4", "model.window=8"]


def test_grouped_heads_and_a_window_stand_at_their_prediction(readings):
    healthy = readings(*GROUPED)
    for name in RATIOS:
        assert healthy[name].shape == (30, 2, 2)
        assert 0.75 < np.sqrt(np.mean(healthy[name] ** 2)) < 1.3, name
        assert healthy[name].max() < 3.5, name


@pytest.mark.parametrize(("site", "head", "law"), [("o", 3, "key_shift"), ("dq", 0, "qk_gauge"), ("dv", 1, "vo_gauge")])
def test_a_faulty_head_is_felt_in_its_key_value_head_alone(readings, site, head, law):
    where = ["fault.layers=[1]", f"fault.heads=[{head}]", "fault.onset=10"]
    faulty = readings(*GROUPED, "fault=bf16_shift", f"fault.sites=[{site}]", "fault.bits=5", *where)
    broken = faulty[f"{law}_residual{'' if law == 'key_shift' else '.matrix'}.over_noise"]
    group = head if site == "dv" else head // 2
    assert (broken[10:, 1, group] > 3).all()
    assert max(broken[:, 0].max(), broken[:, 1, 1 - group].max(), broken[:10].max()) < 3


@pytest.mark.parametrize("fault", [["fault=lr_scale", "fault.factor=10"], ["fault=batch_shrink", "fault.factor=0.5"]])
def test_hyperparameter_faults_break_no_law(readings, fault):
    faulty = readings(*fault)
    assert all(faulty[name].max() < 3 for name in RATIOS)


def test_an_fp32_kernel_keeps_the_laws_and_has_no_prediction(readings):
    for model in ([], GROUPED):
        found = readings("model.backend=sdpa", *model)
        assert set(found) == set(LAWS)
        assert max(values.max() for values in found.values()) < 1e-4


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="rows=-1"):
        AttentionLaws(every_steps=10, rows=-1)
