"""What an attached watch reads of models of ``transformers``, in health and with a broken backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import foreshock
from foreshock.models.anatomies import attention_capture
from foreshock.models.anatomy import LINEAR_LAYERS, NORMS, OUTSIDE, Anatomy, Heads
from foreshock.monitors.base import Masked
from tests.attaching.hugging_face import batches, model_of

THRESHOLD = 4.26
"""Of a ratio to predicted noise, as the README gives it: 5 % of runs with false alarms."""
NEVER = {"delta_bias_oracle", "loss_scale"}
"""The oracle of injected faults, and what reads a GradScaler."""
PRESENT = 28
DENSE = {"router_laws", "router_weight", "routing_probability", "expert_load"}
"""Monitors of a router."""
SOURCES = {"GPT2": "gpt2", "Llama": "llama", "Qwen3": "qwen3", "Mixtral": "mixtral"}

Readings = dict[str, list[Tensor]]


def watched(
    model: nn.Module, steps: int, bf16: bool = False, **options
) -> tuple[foreshock.attaching.watch.AttachedWatch, Readings]:
    """Train for some steps with a watch; its readings by signal, one a step that had one."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    readings: Readings = {}
    with foreshock.attach(model, optimizer, quiet=True, **options) as watch:
        for batch in batches(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            for name, reading in watch.step(loss).items():
                value = reading.value if isinstance(reading, Masked) else reading
                readings.setdefault(name, []).append(value.double())
            optimizer.zero_grad()
    assert watch.stopped is None, watch.tracebacks
    return watch, readings


def in_attention(readings: Readings) -> Readings:
    """Ratios to predicted noise of attention's laws, and of attention computed again."""
    laws = ("key_shift", "value_shift", "qk_gauge", "vo_gauge", "attention_recomputed")
    return {name: of for name, of in readings.items() if name.startswith(laws) and name.endswith(".over_noise")}


@pytest.mark.parametrize("kind", SOURCES)
def test_most_monitors_read_and_the_others_say_why(kind):
    watch, readings = watched(model_of(kind), 10, every_steps=5)
    read = {name for name in watch.monitors if any(s.name in readings for s in watch.monitor(name).signals)}
    routed = kind == "Mixtral"
    can = PRESENT - len(NEVER) - (0 if routed else len(DENSE))
    assert len(read) >= 0.8 * (PRESENT - len(NEVER))
    assert len(read) >= can - 1  # a window of 50 steps has not passed: random_matrix
    assert watch.declined.keys() == NEVER | (set() if routed else DENSE)
    assert watch.declined["delta_bias_oracle"] == "an oracle: it reads what an injected fault does"
    assert all(torch.isfinite(value).all() for name, of in readings.items() for value in of if "entropy" not in name)
    outside = [
        of for name, of in readings.items() if name.endswith(".over_noise") and name not in in_attention(readings)
    ]
    assert len(outside) >= 10
    assert all(0.05 < torch.stack(of).square().mean().sqrt() < 3.5 for of in outside)


@pytest.mark.numeric
@pytest.mark.parametrize("bf16", [False, True], ids=["FP32", "BF16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_healthy_kernel_breaks_laws_as_far_as_predicted(kind, attention, bf16):
    _, readings = watched(model_of(kind, attention), 16, bf16, monitors=["attention_*"], every_steps=1)
    found = {name: torch.stack(of).square().mean().sqrt().item() for name, of in in_attention(readings).items()}
    assert len(found) == 10
    assert not {name: rms for name, rms in found.items() if not 0.8 < rms < 1.25}
    assert max(torch.stack(of).max() for of in in_attention(readings).values()) < THRESHOLD


def truncated(gradient: Tensor, bits: int = 2) -> Tensor:
    """Without its lowest bits."""
    as_int = torch.int16 if gradient.dtype is torch.bfloat16 else torch.int32
    return (gradient.contiguous().view(as_int) & -(2**bits)).view(gradient.dtype)


def with_a_broken(tensor: str) -> Callable[..., Tensor]:
    """PyTorch's attention, whose backward truncates dV, or the dO that it takes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *arguments, **named) -> Tensor:
        if tensor == "dv" and v.requires_grad:
            v.register_hook(truncated)
        o = attention_capture.SDPA(q, k, v, *arguments, **named)
        if tensor == "do" and o.requires_grad:
            o.register_hook(truncated)
        return o

    return attention


@pytest.mark.parametrize("tensor", ["dv", "do"])
@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_two_bits_of_one_tensor_of_the_backward_alarm_at_the_first_reading(kind, tensor, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", with_a_broken(tensor))
    _, readings = watched(model_of(kind), 1, bf16=True, profile="laws", every_steps=1)
    largest = {name: of[0].max().item() for name, of in in_attention(readings).items()}
    assert max(largest.values()) > THRESHOLD
    assert largest["value_shift_residual.over_noise"] > THRESHOLD


@pytest.mark.parametrize(("bf16", "bits"), [(False, 4), (True, 2)], ids=["FP32, 4 bits of 23", "BF16, 2 bits of 7"])
def test_bits_of_eager_attention_alarm_at_the_first_reading(bf16, bits, monkeypatch):
    from transformers.models.gpt2 import modeling_gpt2

    eager = modeling_gpt2.eager_attention_forward

    def broken(module, query, key, value, *arguments, **named):
        value.register_hook(lambda gradient: truncated(gradient, bits))
        return eager(module, query, key, value, *arguments, **named)

    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", broken)
    _, readings = watched(model_of("GPT2", "eager"), 1, bf16, profile="laws", every_steps=1)
    assert max(of[0].max().item() for of in in_attention(readings).values()) > THRESHOLD


def roles(anatomy: Anatomy) -> set[str]:
    return {role for role in (*OUTSIDE, *NORMS, *LINEAR_LAYERS) if anatomy.parameters(role)}


BASE = {"embedding", "head", "final_norm", "attention_norm", "mlp_norm", *"qkvo", "input", "output"}
ROUTED = {"experts_input", "experts_gate", "experts_output", "router"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "GPT2": BASE | {"positions"},
        "Llama": BASE | {"gate"},
        "Qwen2": BASE | {"gate"},
        "Qwen3": BASE | {"gate", "q_norm", "k_norm"},
        "Mistral": BASE | {"gate"},
        "Olmo": BASE - {"final_norm", "attention_norm", "mlp_norm"} | {"gate"},  # its norms have no weight
        "Olmo2": BASE - {"attention_norm", "mlp_norm"} | {"gate", "q_norm", "k_norm"},  # its norms follow its parts
        "Mixtral": BASE - {"input", "output"} | ROUTED,
        "Qwen3Moe": BASE - {"input", "output"} | ROUTED | {"q_norm", "k_norm"},
    }.items(),
)
def test_a_model_is_recognised_by_its_structure(kind, expected):
    anatomy = Anatomy.of(model_of(kind))
    assert roles(anatomy) == expected
    assert anatomy.heads == (Heads(4, 4, 16) if kind == "GPT2" else Heads(4, 2, 16))
    assert anatomy.tied == (kind == "GPT2")
    assert len(anatomy.blocks) == 2
    weights = anatomy.weights()
    assert anatomy.stacked("q", weights).shape == (2, 64, 64)
    assert anatomy.stacked("k", weights).shape == (2, 16 * anatomy.heads.key_value, 64)
    assert anatomy.stacked("o", weights).shape == (2, 64, 64)


def test_a_fused_product_is_cut_into_the_projections_that_the_model_makes_of_it():
    model = model_of("GPT2")
    anatomy, x = Anatomy.of(model), torch.randn(3, 64)
    attention = model.transformer.h[0].attn
    products = attention.c_attn(x).split(64, -1)
    for role, product in zip("qkv", products, strict=True):
        own = anatomy.role(role)[0].of(anatomy.weights())
        torch.testing.assert_close(x @ own.T, product)


def test_a_router_that_cannot_be_looked_at_switches_off_the_monitors_of_routings_alone(monkeypatch):
    def fails(*_):
        raise RuntimeError("a hook is wrong")

    def left(watched: bool):
        model = model_of("Mixtral")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        watch = foreshock.attach(model, optimizer, every_steps=2, quiet=True) if watched else None
        for tokens in batches(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            if watch is not None:
                watch.step(loss)
            optimizer.zero_grad()
        return list(model.parameters()), watch

    without, _ = left(False)
    monkeypatch.setattr("foreshock.models.anatomies.router_capture.Routing", fails)
    weights, watch = left(True)
    assert all(map(torch.equal, without, weights))
    lost = {name for name, reason in watch.declined.items() if "it cannot look at the routers: RuntimeError" in reason}
    assert lost == {"expert_load", "linear_laws", "router_laws", "routing_probability"} == watch.tracebacks.keys()
    assert watch.stopped is None and {"router_weight", "attention_laws"} <= {*watch.monitors}
