"""One gloo process: DistributedDataParallel is watched as any model, and what FSDP2 hides is declined by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import foreshock
from tests.attaching.loops import batches, gpt, same, train


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 2], ids=["whole batches", "accumulation"])
def test_ddp_trains_alike_with_a_watch(one_process, parts):
    without = train(gpt(), False, wrap=DistributedDataParallel, parts=parts)
    watched = train(gpt(), True, wrap=DistributedDataParallel, parts=parts)
    assert same(without.left, watched.left)
    watch = watched.watch
    assert watch.stopped is None and not watch.tracebacks
    assert {"grad_global_norm", "key_shift_residual.over_noise", "adam_update_rms"} <= watch.seen.keys()


def test_the_gradient_norm_is_that_of_the_reduced_gradients(one_process):
    model = gpt()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with foreshock.attach(wrapped, optimizer, monitors="gradient_norm", quiet=True) as watch:
        batch = batches(1)[0]
        loss = wrapped(batch[:, :-1], batch[:, 1:])[1]
        loss.backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert torch.equal(watch.step(loss)["grad_global_norm"], expected)


def test_what_fsdp2_hides_is_declined_by_name(one_process):
    model = gpt()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    watch = foreshock.attach(model, torch.optim.AdamW(model.parameters()), quiet=True)
    assert watch.monitors == ("loss", "tokens")
    assert watch.declined["attention_laws"] == (
        "parameters such as wte.weight are DTensors (FSDP2): no rank has them whole"
    )
    watch.close()


def test_the_first_rank_alone_writes_and_prints(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "run"
    first = train(gpt(), True, out=folder, quiet=False, monitors="loss", actions="snapshot").watch
    assert (folder / "manifest.json").exists() and capsys.readouterr().err
    written = (folder / "manifest.json").read_bytes()
    monkeypatch.setenv("RANK", "1")
    second = train(gpt(), True, out=folder, quiet=False, monitors="loss", actions="snapshot").watch
    assert first.steps == second.steps == 7 and second.stopped is None
    assert (folder / "manifest.json").read_bytes() == written and not capsys.readouterr().err
