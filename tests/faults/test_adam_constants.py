"""Adam's constants: those of a window's updates, and no others."""

import pytest
import torch

from foreshock.faults.adam_constants import AdamConstants
from foreshock.faults.base import Sites
from foreshock.faults.combined import Combined
from foreshock.faults.operation import Moment
from foreshock.faults.optimizer_update import Update, corrupted_optimizer

HEALTHY = Sites(batch_size=8)


def trained(fault: AdamConstants | None, steps: int, **constants) -> torch.Tensor:
    """A weight after some updates, the fault's operations at each."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True, **constants)
    for step in range(steps):
        weight.grad = torch.sin(weight.detach() * (step + 1))
        sites = HEALTHY if fault is None else fault.sites(step, HEALTHY)
        with corrupted_optimizer(Update(optimizer, {"w": weight}, Moment(0, step, 11)), sites.optimizer):
            optimizer.step()
        assert optimizer.param_groups[0]["betas"] == constants.get("betas", (0.9, 0.999))
    return weight.detach()


@pytest.mark.parametrize(
    ("fault", "constants"),
    [
        (AdamConstants(beta1=0.5), {"betas": (0.5, 0.999)}),
        (AdamConstants(beta2=0.7), {"betas": (0.9, 0.7)}),
        (AdamConstants(epsilon=0.1), {"eps": 0.1}),
    ],
)
def test_the_update_is_that_of_an_adam_with_these_constants(fault, constants):
    wrong = trained(fault, 4)
    assert torch.equal(wrong, trained(None, 4, **constants))
    assert not torch.equal(wrong, trained(None, 4))


def test_updates_before_the_window_keep_their_bits():
    fault = AdamConstants(beta2=0.5, onset=3, duration=1)
    assert torch.equal(trained(fault, 3), trained(None, 3))
    assert not torch.equal(trained(fault, 4), trained(None, 4))


def test_the_constants_are_restored_where_an_update_fails():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    update = Update(optimizer, {}, Moment(0, 0, 11))
    with pytest.raises(RuntimeError), corrupted_optimizer(update, AdamConstants(beta1=0.1).corrupt.operation):
        raise RuntimeError
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"beta1": 1.0}, "fault.beta1=1.0 is not allowed: from 0 to below 1"),
        ({"beta2": -0.1}, "fault.beta2=-0.1 is not allowed"),
        ({"epsilon": -1.0}, "fault.epsilon=-1.0 is not allowed: 0 or more"),
        ({}, "fault.beta1=None, fault.beta2=None and fault.epsilon=None: give at least one of them"),
    ],
)
def test_an_impossible_fault_is_refused_by_name(constants, message):
    with pytest.raises(ValueError, match=message):
        AdamConstants(**constants)


def test_the_run_s_own_constants_are_refused_before_training(make_run):
    beta1, beta2 = make_run().train.betas
    with pytest.raises(ValueError, match=f"fault.beta1={beta1}, fault.beta2={beta2}, .* change nothing"):
        make_run("fault=adam_constants", f"fault.beta1={beta1}", f"fault.beta2={beta2}")


def test_two_values_for_one_constant_meet(make_run):
    run = make_run("fault=adam_constants")
    both = Combined({"a": AdamConstants(beta2=0.5), "b": AdamConstants(beta2=0.7)})
    with pytest.raises(ValueError, match="meet: only one of them may set a value"):
        both.sites(0, HEALTHY).check_fits(run.model_config, run.train)
    apart = Combined({"a": AdamConstants(beta2=0.5), "b": AdamConstants(beta1=0.7)})
    apart.sites(0, HEALTHY).check_fits(run.model_config, run.train)
