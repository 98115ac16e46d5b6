"""Every mistake is one line that names what is wrong; what fails while training goes on stops no training."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

import foreshock
from foreshock.experiments import trace
from foreshock.experiments.files import write_whole
from foreshock.monitors.optimization import GradientNorm
from tests.attaching.loops import VOCABULARY, batches, gpt, same, train


def attached(model: nn.Module, **options):
    return foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True, **options)


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.AdamW(gpt().parameters())
    with pytest.raises(
        ValueError, match=r"^attach: AdamW holds 28 of 28 parameters that GPT does not have, the first of shape"
    ):
        foreshock.attach(gpt(), optimizer, quiet=True)


def test_a_step_without_a_backward_is_refused_and_the_next_one_reads():
    model = gpt()
    with attached(model) as watch:
        with pytest.raises(
            ValueError, match=r"^watch\.step\(loss\): no backward has reached the model since the last step"
        ):
            watch.step(torch.tensor(1.0))
        batch = batches(1)[0]
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        assert "train_loss_raw" in watch.step(loss)
        with pytest.raises(ValueError, match="no backward has reached the model"):
            watch.step(loss)


def test_a_second_watch_on_a_model_is_refused_until_the_first_is_closed():
    model = gpt()
    first = attached(model)
    with pytest.raises(ValueError, match=r"^attach: this GPT has a watch already: close\(\) that first$"):
        attached(model)
    first.close()
    attached(model).close()
    with pytest.raises(ValueError, match="the watch is closed"):
        first.step(1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"monitors": ["gradient_nrom"]},
            ValueError,
            r"monitors: 'gradient_nrom' matches none .*did you mean 'gradient_norm'\?$",
        ),
        (
            {"profile": "law"},
            ValueError,
            r"profile='law' is not allowed: one of icu, laws, all; did you mean 'laws'\?$",
        ),
        ({"every_steps": 0}, ValueError, r"every_steps=0 is not allowed: a whole number from 1, or None$"),
        ({"rows": True}, ValueError, r"rows=True is not allowed"),
        ({"scaler": 3}, ValueError, r"scaler=int is not allowed: a torch\.amp\.GradScaler$"),
        ({"row": 2}, TypeError, r"attach\(row=\.\.\.\) is not allowed: .*did you mean 'rows'\?$"),
        (
            {"monitors": "loss", "profile": "icu"},
            ValueError,
            r"profile='icu' has no effect beside monitors=: give one of the two$",
        ),
        (
            {"monitors": ["loss", "gradient_norm"], "every_steps": 5},
            ValueError,
            r"every_steps=5 has no effect: every step is read by gradient_norm, loss$",
        ),
        ({"alarms": False, "on_alarm": print}, ValueError, r"on_alarm has no effect with alarms=False$"),
        ({"alarms": False, "actions": "raise"}, ValueError, r"actions has no effect with alarms=False$"),
        (
            {"writers": [print]},
            ValueError,
            r"writers=builtin_function_or_method is not allowed: it has no open\(\): a writer has open, add",
        ),
        ({"writers": print}, ValueError, r"writers=builtin_function_or_method is not allowed: a list of writers$"),
        ({"monitors": "router_*"}, ValueError, r"attach: no monitor is left; router_laws: the model has no 'router'"),
    ],
)
def test_a_wrong_option_is_named(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        attached(gpt(), **options)


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    train(gpt(), True, out=tmp_path / "run", profile="icu")
    with pytest.raises(ValueError, match=r"^out=.*run' is not allowed: it holds a run; name a new folder$"):
        attached(gpt(), out=tmp_path / "run")


def test_a_missing_need_declines_by_name(capsys):
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = foreshock.attach(model, optimizer)
    assert watch.declined["adam_update_rms"] == "SGD keeps no second moment of the gradients, as Adam does"
    assert watch.declined["router_weight"].startswith("the model has no 'router'")
    assert {"loss", "gradient_norm", "attention_laws"} <= set(watch.monitors)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == f"foreshock: {len(watch.monitors)} monitors watch GPT, {len(watch.declined)} decline:"
    assert [line.split()[0] for line in printed[1:]] == list(watch.declined)
    watch.close()


def test_a_monitor_that_raises_is_switched_off_and_training_goes_on(monkeypatch):
    def broken(self, view):
        raise RuntimeError("a monitor of one's own\nis wrong")

    without = train(gpt(), False)
    monkeypatch.setattr(GradientNorm, "observe", broken)
    watched = train(gpt(), True)
    watch = watched.watch
    assert same(without.left, watched.left)
    assert watch.stopped is None and watch.steps == 7
    assert "gradient_norm" not in watch.monitors and watch.seen["train_loss_raw"] == 7
    assert watch.declined["gradient_norm"] == (
        "switched off, it raised RuntimeError: a monitor of one's own is wrong (watch.tracebacks['gradient_norm'])"
    )
    assert 'raise RuntimeError("a monitor' in watch.tracebacks["gradient_norm"]


def test_a_full_disk_stops_the_watch_and_not_the_training(tmp_path, monkeypatch, capsys):
    written = []

    def full(path, data):
        written.append(path.name)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_whole(path, data)

    without = train(gpt(), False)
    monkeypatch.setattr("foreshock.experiments.trace.write_whole", full)
    monkeypatch.setattr("foreshock.experiments.trace.PART_STEPS", 3)
    watched = train(gpt(), True, out=tmp_path / "run", quiet=False, profile="icu")
    assert same(without.left, watched.left)
    assert "No space left on device" in watched.watch.stopped and watched.watch.steps == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert len(said) == 1 and said[0].startswith("foreshock: step 3: the watch has stopped, training goes on: ")
    with pytest.raises(trace.TraceError, match=r"^run run \(running\) has no readings: foreshock\.attach writes them "):
        trace.read(tmp_path / "run")


def test_a_listener_that_raises_is_switched_off_and_stops_neither_watch_nor_training():
    def listener(step, readings):
        raise KeyError(step)

    without, watched = train(gpt(), False), train(gpt(), True, on_readings=listener)
    assert same(without.left, watched.left)
    assert watched.watch.stopped is None and "KeyError: 1" in watched.watch.tracebacks["listener"]


def test_gradients_that_are_gone_are_named():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with foreshock.attach(model, optimizer, quiet=True, every_steps=1) as watch:
        batch = batches(1)[0]
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        readings = watch.step(loss)
    assert "grad_global_norm" in readings and "adam_update_rms" not in readings
    assert watch.declined["adam_update_rms"] == "gradients are gone: call watch.step(loss) before optimizer.zero_grad()"


@pytest.mark.parametrize("module", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))])
def test_a_model_without_blocks_is_refused_by_what_it_lacks(module):
    with pytest.raises(ValueError, match=rf"^anatomy: {type(module).__name__} does not fit, it has no list of blocks"):
        attached(module)


def test_a_module_that_no_gradient_reaches_is_named():
    model = gpt()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("h.1", "ln_f")))
    watch = train(model, True).watch
    assert watch.declined["linear_laws"] == (
        "no gradient reaches h.0.attn.c_attn: it is not used, or all before it is frozen"
    )
    assert "grad_global_norm" in watch.seen and watch.stopped is None and not watch.tracebacks


def test_a_refused_alarms_file_leaves_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="alarms="):
        attached(gpt(), out=tmp_path / "run", alarms=tmp_path / "none.json")
    with pytest.raises(ValueError, match="actions="):
        attached(gpt(), out=tmp_path / "run", actions="shout")
    assert not (tmp_path / "run").exists()


def test_a_loss_as_a_number_is_read():
    model, batch = gpt(), batches(1)[0]
    with attached(model, every_steps=1) as watch:
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        assert watch.step(loss.item())["train_loss_raw"].item() == pytest.approx(loss.item())
    assert watch.stopped is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_loss_on_the_host_is_read_beside_a_model_on_a_gpu():
    model, batch = gpt().cuda(), batches(1)[0].cuda()
    with attached(model, every_steps=1) as watch:
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        assert watch.step(loss.item())["train_loss_raw"].is_cuda
    assert watch.stopped is None and not watch.tracebacks


def test_gradients_that_are_zeroed_in_place_before_the_step_are_named():
    model, batch = gpt(), batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with foreshock.attach(model, optimizer, quiet=True, every_steps=1) as watch:
        loss = model(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        readings = watch.step(loss)
    assert "grad_global_norm" in readings and "adam_update_rms" not in readings
    assert watch.declined["adam_update_rms"].startswith("gradients are gone: call watch.step(loss) before")


def test_sparse_gradients_have_a_norm_and_stop_no_watch():
    def model() -> nn.Module:
        made = gpt()
        made.wte, made.lm_head = nn.Embedding(VOCABULARY, 32, sparse=True), nn.Linear(32, VOCABULARY, bias=False)
        return made

    made, batch = model(), batches(1)[0]
    optimizer = torch.optim.SGD(made.parameters(), 1e-2)
    with foreshock.attach(made, optimizer, quiet=True, every_steps=1) as watch:
        loss = made(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        gradients = [p.grad.to_dense() for p in made.parameters()]
        optimizer.step()
        readings = watch.step(loss)
    assert watch.stopped is None
    torch.testing.assert_close(readings["grad_global_norm"], torch.nn.utils.get_total_norm(gradients))


def test_a_long_error_is_said_in_one_short_line(monkeypatch):
    def broken(self, view):
        raise RuntimeError("number\n" * 1000)

    monkeypatch.setattr(GradientNorm, "observe", broken)
    watch = train(gpt(), True).watch
    assert "..." in watch.declined["gradient_norm"] and len(watch.declined["gradient_norm"]) < 300
    assert len(watch.tracebacks["gradient_norm"]) > 5000
