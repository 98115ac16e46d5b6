"""Objects of ``conf/`` built without Hydra are those that it builds."""

import pytest
from omegaconf import OmegaConf

from foreshock.experiments import build
from foreshock.experiments.plain_config import construct, monitors_of


def told(monitor):
    """All that distinguishes one monitor from another."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(monitor).items()}
    return type(monitor), values


@pytest.mark.parametrize("model", ["mha_nano", "moe_nano"])
def test_monitors_are_those_of_a_run(make_run, model):
    run = make_run(f"model={model}", tiny=False)
    plain = monitors_of(experts=run.model_config.moe is not None)
    assert sorted(plain) == sorted(run.monitors)
    for name, monitor in plain.items():
        assert told(monitor) == told(run.monitors[name]), name


@pytest.mark.parametrize(("group", "name"), [("model", "gpt2_124m"), ("train", "gpt2"), ("fault", "bf16_shift")])
def test_other_objects_are_too(make_config, group, name):
    node = OmegaConf.to_container(make_config(f"{group}={name}", tiny=False)[group], resolve=True)
    assert construct(group, name) == build.construct(node, group)


def test_a_changed_value_takes_the_place_of_the_file_s():
    assert construct("train", "gpt2", batch_size=8, micro_batch=4).batch_size == 8
    assert construct("train", "gpt2").batch_size == 256
