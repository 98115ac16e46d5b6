"""``make gpu-check`` as far as a CPU shows it: its checks in Triton's interpreter, and its own counting and writing."""

import json
import subprocess
import sys

import pytest
import torch

from foreshock.experiments import gpu_check, gpu_correctness, gpu_speed
from foreshock.experiments.build import ROOT
from foreshock.experiments.gpu_check import new_record
from foreshock.experiments.gpu_correctness import (
    UNORDERED,
    Shape,
    check_arithmetic,
    check_attention,
    check_compiled,
    check_faults,
    check_repeats,
    distance,
    one_fault_a_head,
)
from foreshock.experiments.gpu_record import attempt, file_name
from foreshock.experiments.gpu_speed import Case, cases, contestants, faulty, flops, in_turns, summary
from foreshock.models.arithmetic import Arithmetic
from foreshock.models.attention import attention
from foreshock.models.bits import truncate
from foreshock.models.numerics import FORWARD_SITES, HEALTHY_LAYER, KEY_VALUE_SITES, SITES
from foreshock.models.wiring import Wiring
from tests.models.attention_in_triton import ADDING_TILES, DEVICE, ONE_TILE, SMALL_TILES

GROUPED = Shape(18, 9, 12, 20, 16)
SHIFTED = Wiring(mask_shift=20, heads=(1,), scalings=2)


def test_another_order_of_sums_is_told_from_one_bit():
    """256 rows of dQ of 4,096 keys, added up over tiles of 64 keys forward and in another order."""
    generator = torch.Generator().manual_seed(0)
    p, dp = (torch.randn(256, 4096, generator=generator) for _ in range(2))
    ds, k = (p.softmax(-1) * dp).bfloat16().float(), torch.randn(4096, 64, generator=generator).bfloat16().float()
    parts = [a @ b for a, b in zip(ds.split(64, 1), k.split(64), strict=True)]
    there, shuffled = (
        sum(parts[i] for i in order).bfloat16()
        for order in (range(64), torch.randperm(64, generator=generator).tolist())
    )
    assert not torch.equal(there, shuffled)
    assert distance(there, shuffled) < UNORDERED / 4
    assert distance(truncate(there, 1), there) > UNORDERED * 4


@pytest.fixture
def wrong_kernel(monkeypatch):
    """A kernel that does something else than it is asked to."""

    def install(**wrong):
        def broken(*x, backend, **settings):
            return attention(*x, backend=backend, **(settings | wrong if backend == "triton" else settings))

        monkeypatch.setattr(gpu_correctness, "attention", broken)

    return install


@pytest.mark.triton
@pytest.mark.slow
def test_a_right_kernel_passes_every_check():
    assert check_attention(Shape(2, 1, 9, 37, 24), DEVICE, SMALL_TILES)["ok"]
    assert check_attention(Shape(2, 1, 9, 37, 24), DEVICE, SMALL_TILES, SHIFTED)["ok"]
    assert check_faults(GROUPED, "backward", "truncate", 1.0, DEVICE, ONE_TILE)["ok"]
    assert check_faults(GROUPED, "backward", "truncate", 1.0, DEVICE, ADDING_TILES)["ok"]
    assert check_arithmetic(Arithmetic("bf16"), Shape(2, 1, 9, 37, 16), DEVICE, ONE_TILE)["ok"]
    assert check_repeats(GROUPED, DEVICE, SMALL_TILES, HEALTHY_LAYER)["ok"]
    assert check_compiled(Shape(1, 1, None, 5, 16), DEVICE, ONE_TILE, faulty(7), backend="aot_eager")["ok"]


@pytest.mark.triton
@pytest.mark.slow
def test_a_wrong_kernel_fails_them(wrong_kernel):
    wrong_kernel(window=8)
    assert not check_attention(Shape(2, 1, 9, 37, 24), DEVICE, SMALL_TILES)["ok"]
    wrong_kernel(numerics=HEALTHY_LAYER)
    assert not check_attention(Shape(2, 1, 9, 37, 24), DEVICE, SMALL_TILES, SHIFTED)["ok"]
    wrong_kernel(numerics=one_fault_a_head("backward", "flip", 1.0, 2)[0])
    assert not check_faults(GROUPED, "backward", "truncate", 1.0, DEVICE, ONE_TILE)["ok"]
    wrong_kernel(numerics=HEALTHY_LAYER)
    assert not check_arithmetic(Arithmetic("bf16"), Shape(2, 1, 9, 37, 16), DEVICE, ONE_TILE)["ok"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_every_site_has_query_heads_of_its_own(phase):
    numerics, head = one_fault_a_head(phase, "truncate", 1.0, group=2)
    assert set(head) == set(SITES if phase == "backward" else FORWARD_SITES)
    assert {site: fault.heads for (site, _), (fault,) in numerics.items()} == {s: (h,) for s, h in head.items()}
    reached = [h for s in head for h in ([2 * head[s], 2 * head[s] + 1] if s in KEY_VALUE_SITES else [head[s]])]
    assert len(set(reached)) == len(reached) and max(reached) < GROUPED.heads


def test_operations_are_counted_as_in_the_papers():
    assert flops(Case(1024, 64), backward=False) == 4 * 1024**2 * 64 / 2 * 16 * 16
    assert flops(Case(16384, 128), backward=True) == 3.5 * 4 * 16384**2 * 128 / 2 * 16
    assert all(B * S == 16384 for B, _, S, _ in (case.shape for case in cases()))


def test_contestants_are_measured_in_turns_and_warm_up_does_not_count():
    order = []
    samples = {"a": iter([9.0] * 3 + [1.0] * 6 + [7.0] * 5), "b": iter([2.0] * 14)}

    def sample(call):
        order.append(call())
        return next(samples[order[-1]])

    assert in_turns({"a": lambda: "a", "b": lambda: "b"}, sample) == {"a": 1.0, "b": 2.0}
    assert order == ["a", "b"] * 14


def test_times_become_ratios_to_the_healthy_kernel():
    found = summary({"healthy": 2.0, "cuDNN": 1.0}, Case(1024, 64), backward=False)
    assert found["cuDNN"]["time_over_healthy"] == 0.5
    assert found["healthy"]["tflops"] == pytest.approx(4 * 1024**2 * 64 / 2 * 256 / 2e-3 / 1e12)


@pytest.mark.triton
def test_sites_compiled_in_are_off_at_zero_bits_and_on_at_seven():
    made = contestants(Case(1024, 16), DEVICE)
    x = [torch.randn(1, 1, 9, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16) for _ in "qkv"]
    healthy, off, on = (made[name]()(*x) for name in ("healthy", "sites compiled in, off", "sites on"))
    assert torch.equal(healthy, off) and not torch.equal(healthy, on)


def test_a_rival_that_is_missing_is_named_and_the_rest_is_measured(monkeypatch):
    def absent():
        raise RuntimeError("no kernel\nfor this device")

    def ours():
        return lambda q, k, v: q + k + v

    monkeypatch.setattr(gpu_speed, "TOKENS", 8)
    monkeypatch.setattr(gpu_speed, "contestants", lambda *_: {"healthy": ours, "cuDNN": absent})
    monkeypatch.setattr(gpu_speed, "in_turns", lambda calls: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_speed.measure(Case(4, 16), torch.device("cpu"))
    assert found["missing"] == {"cuDNN": "RuntimeError: no kernel"}
    assert list(found["forward and backward"]) == ["healthy"]


def test_what_is_measured_is_written_at_once_and_the_limit_stops_the_rest(tmp_path):
    now = [0.0]
    record = new_record(tmp_path / "gpu" / "a.json", {"device": "x"}, clock=lambda: now[0])

    def written():
        return json.loads((tmp_path / "gpu" / "a.json").read_text())

    assert written()["machine"] == {"device": "x"} and not written()["complete"]
    assert record.piece("checks", "good", lambda: {"ok": True})
    assert record.piece("checks", "bad", lambda: {"ok": False})
    assert record.piece("speed", "raises", lambda: 1 / 0)
    assert written()["checks"] == {"good": {"ok": True}, "bad": {"ok": False}}
    now[0] = 301.0
    assert not record.piece("checks", "waits", lambda: {"ok": True}, gpu_check.SPEED_FROM_S)
    now[0] = 500.0
    assert not record.piece("speed", "late", lambda: {})
    assert record.finish(["waits", "late"]) == ["bad", "raises"]
    assert written()["not_reached"] == ["waits", "late"] and written()["wall_s"] == 500.0
    assert not list((tmp_path / "gpu").glob("*.part"))


def test_checks_that_had_to_wait_follow_the_speed(monkeypatch, tmp_path):
    now, done = [0.0], []

    def piece(name, seconds, result):
        def work(*_):
            now[0] += seconds
            done.append(name)
            return result

        return work

    every = [("slow", piece("slow", 310, {"ok": True})), ("quick", piece("quick", 10, {"ok": False}))]
    monkeypatch.setattr(gpu_check, "checks", lambda device: every)
    monkeypatch.setattr(gpu_check, "cases", lambda: [Case(1024, 64), Case(2048, 64)])
    monkeypatch.setattr(gpu_check, "measure", piece("speed", 100, {"forward": {}}))
    assert gpu_check.check_machine(new_record(tmp_path / "a.json", {}, clock=lambda: now[0])) == []
    assert done == ["slow", "speed", "speed"]
    now[0] = 0.0
    every[0] = ("slow", piece("slow", 301, {"ok": True}))
    monkeypatch.setattr(gpu_check, "measure", piece("speed", 50, {"forward": {}}))
    assert gpu_check.check_machine(new_record(tmp_path / "a.json", {}, clock=lambda: now[0])) == ["quick"]
    assert done[3:] == ["slow", "speed", "speed", "quick"]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["complete"] and list(written["speed"]) == ["1024 tokens, d_head 64", "2048 tokens, d_head 64"]


def test_a_check_that_raises_has_failed_with_one_line():
    def raises():
        raise ValueError("first\nsecond")

    assert attempt(raises) == {"ok": False, "error": "ValueError: first"}


def test_a_device_names_its_file():
    assert file_name("NVIDIA H200") == "nvidia-h200.json"
    assert file_name("NVIDIA H200", "-gpt2") == "nvidia-h200-gpt2.json"


@pytest.mark.parametrize("module", ["gpu_check", "gpu_tiles"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would begin")
def test_without_a_gpu_it_says_so_in_one_line(module):
    command = [sys.executable, "-m", f"experiments.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {module.replace('_', '-')} needs a CUDA device that torch sees\n"


def test_it_needs_no_more_than_models():
    code = (
        "import sys, experiments.gpu_check, experiments.gpu_tiles; print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"hydra", "omegaconf", "pandas", "pyarrow", "pydantic", "scipy", "rich"} & set(done.stdout.split())
