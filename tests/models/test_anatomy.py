"""Every part of every model has its role, and a module that does not fit is refused by what it lacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from foreshock.experiments.plain_config import CONF, construct, read
from foreshock.models.anatomy import BLOCK, LINEAR_LAYERS, NORMS, OUTSIDE, Anatomy, Part
from foreshock.models.moe import MoEConfig
from foreshock.models.taps import Tap
from foreshock.models.transformer import Transformer, TransformerConfig, skeleton


def configured(name: str) -> TransformerConfig:
    """The model of ``conf/model/<name>.yaml`` on a CPU."""
    moe = read("model", name).get("moe")
    changes = {} if moe is None else {"moe": MoEConfig(**{key: moe[key] for key in moe if key != "_target_"})}
    return construct("model", name, **changes).on(torch.device("cpu"))


PLAIN = TransformerConfig(d_model=16, n_layers=2, n_heads=4, d_ff=32, context_length=8, vocab_size=11)
EXPERTS = MoEConfig(n_experts=4, top_k=2)
MODELS = {
    **{path.stem: configured(path.stem) for path in sorted(CONF.glob("model/*.yaml"))},
    "dense": PLAIN,
    "grouped heads": replace(PLAIN, n_kv_heads=2),
    "gated": replace(PLAIN, mlp="swiglu"),
    "rotary": replace(PLAIN, positions="rope", norm="rmsnorm"),
    "QK-norm": replace(PLAIN, qk_norm=True),
    "untied": replace(PLAIN, tie_embeddings=False),
    "experts": replace(PLAIN, moe=EXPERTS),
    "shared expert": replace(PLAIN, moe=replace(EXPERTS, shared_d_ff=8), mlp="swiglu"),
}
MLP = {"input", "output"}


@pytest.fixture(params=MODELS)
def model(request) -> Transformer:
    return skeleton(MODELS[request.param])


def roles_of(config: TransformerConfig) -> set[str]:
    """The roles that a model of this configuration has."""
    mlp = MLP | ({"gate"} if config.mlp == "swiglu" else set())
    roles = {"embedding", "final_norm", "head", "attention_norm", "mlp_norm", *"qkvo"}
    roles |= {"positions"} if config.positions == "learned" else set()
    roles |= {"q_norm", "k_norm"} if config.qk_norm else set()
    if config.moe is None:
        return roles | mlp
    roles |= {"router", *(f"experts_{part}" for part in mlp)}
    return roles | ({f"shared_{part}" for part in mlp} if config.moe.shared_d_ff else set())


def test_a_model_has_the_roles_of_its_configuration(model):
    anatomy = Anatomy.of(model)
    assert {role for role in (*OUTSIDE, *NORMS, *LINEAR_LAYERS) if anatomy.role(role)} == roles_of(model.config)
    assert len(anatomy.blocks) == model.config.n_layers
    assert anatomy.tied == model.config.tie_embeddings
    assert anatomy.moe == model.config.moe


def test_every_weight_has_one_role(model):
    """A tied head shares its weight with the embedding; the biases of norms belong to the module of their weight."""
    anatomy = Anatomy.of(model)
    times = Counter(name for role in (*OUTSIDE, *NORMS, *LINEAR_LAYERS) for name in anatomy.parameters(role))
    tied = {"tokens.weight"} if anatomy.tied else set()
    assert times == {name: 1 + (name in tied) for name, _ in model.named_parameters() if not name.endswith("norm.bias")}
    in_blocks = [name for name, _ in model.blocks.named_parameters(prefix="blocks")]
    assert anatomy.parameters(BLOCK) == in_blocks


def test_a_role_names_the_module_that_plays_it(model):
    anatomy = Anatomy.of(model)
    assert model.get_submodule(anatomy.parts["embedding"].module) is model.tokens
    assert model.get_submodule(anatomy.parts["final_norm"].module) is model.final_norm
    assert model.get_submodule(anatomy.parts["head"].module) is model.head
    for layer, block in enumerate(model.blocks):
        own = {role: model.get_submodule(part.module) for role, part in anatomy.blocks[layer].parts.items()}
        assert all(own[role] is getattr(block.attention, role) for role in "qkvo")
        assert all(own[role] is getattr(block, role) for role in ("attention_norm", "mlp_norm"))
        prefix = "" if anatomy.moe is None else "experts_"
        assert all(own[prefix + part] is getattr(block.mlp, part) for part in MLP)
        assert anatomy.moe is None or own["router"] is block.mlp.router


def test_projections_have_a_row_for_each_number_of_their_heads(model):
    anatomy = Anatomy.of(model)
    heads, layers = anatomy.heads, len(anatomy.blocks)
    queries, keys = heads.query * heads.width, heads.key_value * heads.width
    for role, shape in {"q": (queries, -1), "k": (keys, -1), "v": (keys, -1), "o": (-1, queries)}.items():
        stacked = anatomy.stacked(role, anatomy.weights())
        shape = tuple(model.config.d_model if size == -1 else size for size in shape)
        assert stacked.shape == (layers, *shape)


def test_a_part_of_a_fused_product_is_its_own_rows_in_a_stack_too():
    weight = torch.arange(24.0).view(6, 4)
    key = Part("qkv", "qkv.weight", rows=(2, 4))
    assert torch.equal(key.of({"qkv.weight": weight}), weight[2:4])
    assert torch.equal(key.of({"qkv.weight": torch.stack((weight, -weight))})[1], -weight[2:4])


def test_the_tap_of_a_part_of_a_fused_product_is_its_rows():
    anatomy = Anatomy.of(Transformer(replace(PLAIN, n_layers=1)))
    (block,) = anatomy.blocks
    taps = {part.module: Tap(anatomy.model.get_submodule(part.module)) for part in block.parts.values()}
    whole = taps["blocks.0.attention.q"]
    whole.output, whole.weight, whole.bias = (
        torch.arange(32.0).view(2, 16),
        torch.arange(256.0).view(16, 16),
        torch.ones(16),
    )
    assert anatomy.taps("q", taps) == [whole]
    fused = replace(block, parts={**block.parts, "q": replace(block.parts["q"], rows=(4, 8))})
    (part,) = replace(anatomy, blocks=(fused,)).taps("q", taps)
    assert torch.equal(part.output, whole.output[:, 4:8])
    assert torch.equal(part.weight, whole.weight[4:8])
    assert torch.equal(part.y, whole.output[:, 4:8] - 1)
    assert anatomy.fused(["q"], taps) == [whole]
    assert anatomy.fused(["q", "k"], taps) == []


def headless(*names: str) -> Transformer:
    """A transformer without some of its modules."""
    model = Transformer(PLAIN)
    for name in names:
        parent, _, child = name.rpartition(".")
        delattr(model.get_submodule(parent), child)
    return model


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2), r"Linear does not fit, it has no list of blocks with attention \(attention, self_attn"),
        (headless("head"), r"Transformer does not fit, it has no head \(head\)$"),
        (headless("blocks"), r"Transformer does not fit, it has no blocks\.0\.attention_norm \(attention_norm\)$"),
        (headless("blocks.1.attention.o"), r"Transformer does not fit, it has no blocks\.1\.attention\.o \(o\)$"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_by_what_it_lacks(module, message):
    with pytest.raises(ValueError, match=f"^anatomy: {message}"):
        Anatomy.of(module)
