"""The anatomy of a language model by its structure: GPT-2, nanoGPT, Llama, Qwen, Mistral, OLMo, Mixtral and their like.

Blocks are the longest list of modules that are alike and have attention. A part is known by its name, of the few that
such models give it, and by its shape; a fused product is cut by the shapes of its neighbours. No class is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foreshock.models.anatomies.parts import Block, Heads, Part
from foreshock.models.moe import MoEConfig

ATTENTION = ("attention", "self_attn", "attn", "self_attention")
PROJECTIONS: Mapping[str, tuple[str, ...]] = {
    "q": ("q", "q_proj", "wq", "query"),
    "k": ("k", "k_proj", "wk", "key"),
    "v": ("v", "v_proj", "wv", "value"),
    "o": ("o", "o_proj", "wo", "c_proj", "out_proj", "proj", "dense"),
}
FUSED_QKV = ("c_attn", "qkv", "qkv_proj", "Wqkv", "wqkv")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
MLP_NAMES: Mapping[str, tuple[str, ...]] = {
    "input": ("input", "up_proj", "c_fc", "fc1", "w3", "fc_in", "dense_h_to_4h"),
    "gate": ("gate", "gate_proj", "w1"),
    "output": ("output", "down_proj", "c_proj", "fc2", "w2", "fc_out", "dense_4h_to_h"),
}
FUSED_GATE_UP = ("gate_up_proj",)
ROUTER, EXPERTS, SHARED = ("router", "gate"), ("experts",), ("shared", "shared_expert", "shared_experts")
BLOCK_NORMS: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("attention_norm", "input_layernorm", "ln_1", "ln1", "norm1", "attn_norm"),
    "mlp_norm": ("mlp_norm", "post_attention_layernorm", "ln_2", "ln2", "norm2", "ffn_norm"),
}
AFTER = ("post_feedforward_layernorm",)
"""A block that has such a norm normalises what its parts return, and nothing that they read."""
QK_NORMS: Mapping[str, tuple[str, ...]] = {
    "q_norm": ("q_norm", "q_layernorm", "query_norm"),
    "k_norm": ("k_norm", "k_layernorm", "key_norm"),
}
HEAD_WIDTH = ("head_dim", "d_head", "head_size")
HEAD_COUNT = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads")


@dataclass(frozen=True)
class Found:
    """What ``models.anatomy.Anatomy`` has beside the model. Fields as there."""

    parts: Mapping[str, Part]
    blocks: tuple[Block, ...]
    heads: Heads
    tied: bool
    moe: MoEConfig | None


def of_structure(model: nn.Module) -> Found:
    """Raises ValueError that names what the model lacks, and what is to be said of it by hand."""
    blocks, prefix = _blocks(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    routed = [_routed(block) for block in blocks]
    moe = next((config for config in map(_moe, routed, [model] * len(routed)) if config is not None), None)
    parts = [_Block(block, f"{prefix}.{index}", names) for index, block in enumerate(blocks)]
    outside = _outside(model, prefix, names)
    tied = _tied(outside)
    return Found(outside, tuple(part.block() for part in parts), parts[0].heads(model), tied, moe)


def _tied(outside: Mapping[str, Part]) -> bool:
    return {"head", "embedding"} <= outside.keys() and outside["head"].weight == outside["embedding"].weight


def child(module: nn.Module | None, names: Iterable[str]) -> tuple[str, nn.Module] | None:
    """The first child of one of these names, with its name."""
    if module is None:
        return None
    return next(((name, found) for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)


def _blocks(model: nn.Module) -> tuple[Sequence[nn.Module], str]:
    lists = [
        (list(module), name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and all(map(_has_attention, module))
    ]
    if not lists:
        raise ValueError(
            f"anatomy: {type(model).__name__} does not fit, it has no list of blocks with attention "
            f"({', '.join(ATTENTION)}): name its parts in anatomy="
        )
    return max(lists, key=lambda found: len(found[0]))


def _has_attention(block: nn.Module) -> bool:
    return child(block, ATTENTION) is not None


def matrix(module: nn.Module | None) -> Tensor | None:
    """The weight of a linear layer, whichever class, else None."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def lies_transposed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is (in, out): no ``nn.Linear``, with a bias as long as the second axis."""
    bias, weight = getattr(module, "bias", None), matrix(module)
    named = getattr(module, "nf", None)
    if isinstance(module, nn.Linear) or weight is None:
        return False
    if isinstance(named, int):
        return weight.shape[1] == named
    return isinstance(bias, Tensor) and len(bias) == weight.shape[1] != weight.shape[0]


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a norm with a gain of its own: of one axis, and named so."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and "norm" in type(module).__name__.lower()


class _Block:
    """One block and its parts."""

    def __init__(self, block: nn.Module, name: str, names: Mapping[int, str]) -> None:
        self.module, self.name, self._names = block, name, names
        found = child(block, ATTENTION)
        assert found is not None
        self.attention_name, self.attention = f"{name}.{found[0]}", found[1]

    def block(self) -> Block:
        parts = self._projections() | self._norms() | self._mlp()
        own = tuple(name for name in self._names.values() if name.startswith(f"{self.name}."))
        return Block(parts, own, self.attention_name)

    def heads(self, model: nn.Module) -> Heads:
        """By the width that the attention module or the configuration names, or by their number of query heads."""
        parts = self._projections()
        places = (self.attention, getattr(model, "config", None))
        width = _number(places, HEAD_WIDTH)
        sizes = {role: _rows(parts[role], self.module, self.name) for role in "qk" if role in parts}
        if len(sizes) < 2:
            return Heads(0, 0, 0)
        if width is None or sizes["q"] % width:
            count = _number(places, HEAD_COUNT)
            if count is None or sizes["q"] % count:
                raise ValueError(
                    f"anatomy: the attention of {type(model).__name__} names no number of heads "
                    f"({', '.join(HEAD_COUNT)}): give it in anatomy={{'heads': ...}}"
                )
            width = sizes["q"] // count
        return Heads(sizes["q"] // width, sizes["k"] // width, width)

    def _part(self, module: nn.Module, name: str, rows: tuple[int, int] | None = None) -> Part:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return Part(name, self._names[id(weight)], rows, lies_transposed(module))

    def _linear(self, parent: nn.Module | None, prefix: str, names: Iterable[str]) -> Part | None:
        found = child(parent, names)
        if found is None or matrix(found[1]) is None:
            return None
        return self._part(found[1], f"{prefix}.{found[0]}")

    def _projections(self) -> dict[str, Part]:
        own = {role: self._linear(self.attention, self.attention_name, names) for role, names in PROJECTIONS.items()}
        parts = {role: part for role, part in own.items() if part is not None}
        fused = child(self.attention, FUSED_QKV)
        if fused is None or matrix(fused[1]) is None:
            return parts
        weight, output = matrix(fused[1]), parts.get("o")
        assert weight is not None
        rows = weight.shape[1] if lies_transposed(fused[1]) else weight.shape[0]
        queries = rows // 3 if output is None else _columns(output, self.module, self.name)
        keys, rest = divmod(rows - queries, 2)
        if rest or keys < 1:
            return parts
        bounds = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, rows)}
        name = f"{self.attention_name}.{fused[0]}"
        return {role: self._part(fused[1], name, cut) for role, cut in bounds.items()} | parts

    def _norms(self) -> dict[str, Part]:
        places = [(self.attention, self.attention_name, QK_NORMS)]
        if child(self.module, AFTER) is None:
            places.append((self.module, self.name, BLOCK_NORMS))
        found = {
            role: (f"{prefix}.{own[0]}", own[1])
            for parent, prefix, roles in places
            for role, names in roles.items()
            if (own := child(parent, names)) is not None and is_norm(own[1])
        }
        return {role: self._part(module, name) for role, (name, module) in found.items()}

    def _mlp(self) -> dict[str, Part]:
        found = child(self.module, MLP)
        if found is None:
            return {}
        name, mlp = f"{self.name}.{found[0]}", found[1]
        experts = child(mlp, EXPERTS)
        if experts is None:
            return self._dense(mlp, name, "")
        parts = self._fused_experts(experts[1], f"{name}.{experts[0]}")
        router = self._linear(mlp, name, ROUTER)
        if router is not None:
            parts["router"] = router
        shared = child(mlp, SHARED)
        return parts if shared is None else parts | self._dense(shared[1], f"{name}.{shared[0]}", "shared_")

    def _dense(self, mlp: nn.Module, name: str, prefix: str) -> dict[str, Part]:
        own = {role: self._linear(mlp, name, names) for role, names in MLP_NAMES.items()}
        parts = {f"{prefix}{role}": part for role, part in own.items() if part is not None}
        fused = child(mlp, FUSED_GATE_UP)
        weight = None if fused is None else matrix(fused[1])
        if fused is not None and weight is not None and weight.shape[0] % 2 == 0:
            half = weight.shape[0] // 2
            for role, cut in (("gate", (0, half)), ("input", (half, 2 * half))):
                parts[f"{prefix}{role}"] = self._part(fused[1], f"{name}.{fused[0]}", cut)
        return parts

    def _fused_experts(self, experts: nn.Module, name: str) -> dict[str, Part]:
        """Of experts whose weights are one tensor of three axes, (E, out, in). A list of experts has no such role."""
        weights = dict(experts.named_parameters(recurse=False))
        parts: dict[str, Part] = {}
        up, down = weights.get("gate_up_proj"), weights.get("down_proj")
        if up is not None and down is not None and up.ndim == 3 and up.shape[1] == 2 * down.shape[2]:
            half = down.shape[2]
            parts["experts_gate"] = Part(name, self._names[id(up)], (0, half))
            parts["experts_input"] = Part(name, self._names[id(up)], (half, 2 * half))
            parts["experts_output"] = Part(name, self._names[id(down)])
        return parts


def _rows(part: Part, block: nn.Module, prefix: str) -> int:
    """How many numbers a part gives."""
    if part.rows is not None:
        return part.rows[1] - part.rows[0]
    weight = block.get_submodule(part.module.removeprefix(f"{prefix}.")).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1 if part.transposed else 0]


def _columns(part: Part, block: nn.Module, prefix: str) -> int:
    """How many numbers a part takes."""
    weight = block.get_submodule(part.module.removeprefix(f"{prefix}.")).weight
    assert isinstance(weight, Tensor)
    return weight.shape[0 if part.transposed else 1]


def _number(places: Iterable[Any], names: Iterable[str]) -> int | None:
    """The first positive whole number that one of these objects has under one of these names."""
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _outside(model: nn.Module, blocks: str, names: Mapping[int, str]) -> dict[str, Part]:
    modules = [(name, module) for name, module in model.named_modules() if not name.startswith(f"{blocks}.")]
    embeddings = [found for found in modules if isinstance(found[1], nn.Embedding)]
    heads = [found for found in modules if not isinstance(found[1], nn.Embedding) and matrix(found[1]) is not None]
    norms = [found for found in modules if is_norm(found[1])]
    parts: dict[str, Part] = {}

    def take(role: str, found: Sequence[tuple[str, nn.Module]]) -> None:
        if found:
            parts[role] = Part(found[0][0], names[id(found[0][1].weight)], None, lies_transposed(found[0][1]))

    if len(heads) == 1:
        take("head", heads)
        vocabulary = heads[0][1].weight.shape[0]
        embeddings.sort(key=lambda found: found[1].num_embeddings != vocabulary)
    take("embedding", embeddings[:1])
    take("positions", embeddings[1:2])
    take("final_norm", norms[-1:])
    return parts


def _routed(block: nn.Module) -> nn.Module | None:
    """The part of a block that has experts."""
    found = child(block, MLP)
    return None if found is None or child(found[1], EXPERTS) is None else found[1]


def _moe(mlp: nn.Module | None, model: nn.Module) -> MoEConfig | None:
    """How a router shares tokens out, as far as the laws of a router ask."""
    if mlp is None:
        return None
    router, config = child(mlp, ROUTER), getattr(model, "config", None)
    weight = None if router is None else matrix(router[1])
    if router is None or weight is None:
        return None
    top_k = _number((router[1], mlp, config), ("top_k", "num_experts_per_tok", "moe_top_k"))
    if top_k is None:
        raise ValueError(f"anatomy: the router {router[0]!r} names no top_k, how many experts a token visits")
    used = getattr(config, "output_router_logits", False)
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if used else 0.0
    layers = _number((config,), ("num_hidden_layers", "n_layer", "n_layers")) or 1
    renormalise = bool(getattr(router[1], "norm_topk_prob", True)) and top_k > 1
    return MoEConfig(weight.shape[0], top_k, renormalise, aux_coef=coefficient * top_k / layers)


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?`` for the nearest name, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
