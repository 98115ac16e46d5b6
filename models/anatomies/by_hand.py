"""The anatomy of a model that its owner describes: a dictionary of roles."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from foreshock.models.anatomies.parts import LINEAR_LAYERS, NORMS, OUTSIDE, Block, Heads, Part
from foreshock.models.anatomies.structure import Found, lies_transposed, nearest

COUNTS = ("heads", "key_value_heads")
KEYS = (*COUNTS, *OUTSIDE, *NORMS, *LINEAR_LAYERS)
_CUT = re.compile(r"^(?P<module>.*?)(?:\[(?P<first>\d+):(?P<last>\d+)\])?$")


def of_roles(model: nn.Module, roles: Mapping[str, str | int]) -> Found:
    """From ``{"heads": 8, "embedding": "wte", "q": "layers.{}.attn.wq", "k": "layers.{}.attn.kv[0:64]", ...}``.

    A role outside the blocks names its module; one of a block has ``{}`` for the block's number, and ``[first:last]``
    for its rows in a fused product. heads: query heads; key_value_heads: ``heads`` by default.
    Raises ValueError for an unknown role, a missing module, or no ``heads`` beside ``q``.
    """
    unknown = next((role for role in roles if role not in KEYS), None)
    if unknown is not None:
        raise ValueError(f"anatomy[{unknown!r}] is not allowed: one of {', '.join(KEYS)}{nearest(unknown, KEYS)}")
    modules = dict(model.named_modules())
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def part(role: str, text: str) -> Part:
        cut = _CUT.match(text)
        assert cut is not None
        name = cut["module"]
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            near = nearest(name, modules)
            raise ValueError(f"anatomy[{role!r}]={text!r} is not allowed: no module of that name has a weight{near}")
        rows = None if cut["first"] is None else (int(cut["first"]), int(cut["last"]))
        return Part(name, names[id(weight)], rows, lies_transposed(modules[name]))

    inside = {role: str(text) for role, text in roles.items() if role in (*NORMS, *LINEAR_LAYERS)}
    outside = {role: part(role, str(text)) for role, text in roles.items() if role in OUTSIDE}
    layers = _layers(inside, modules)
    blocks = []
    for layer in range(layers):
        parts = {role: part(role, text.replace("{}", str(layer))) for role, text in inside.items()}
        prefixes = {f"{text.split('{}')[0]}{layer}." for text in inside.values()}
        own = tuple(name for name in names.values() if name.startswith(tuple(prefixes)))
        blocks.append(Block(parts, own, _together([parts[role].module for role in "qkvo" if role in parts])))
    tied = {"head", "embedding"} <= outside.keys() and outside["head"].weight == outside["embedding"].weight
    return Found(outside, tuple(blocks), _heads(roles, blocks, model), tied, None)


def _layers(inside: Mapping[str, str], modules: Mapping[str, nn.Module]) -> int:
    """How many blocks there are, by the first role of theirs."""
    role, text = next(iter(inside.items()), (None, ""))
    if role is None or "{}" not in text:
        raise ValueError(f"anatomy[{role!r}]={text!r} is not allowed: a block's role has {{}} for the block's number")
    layers = 0
    while _CUT.match(text.replace("{}", str(layers)))["module"] in modules:  # type: ignore[index]
        layers += 1
    if not layers:
        raise ValueError(f"anatomy[{role!r}]={text!r} is not allowed: the model has no such module for block 0")
    return layers


def _together(names: list[str]) -> str | None:
    """The module that holds all of these."""
    if not names:
        return None
    paths = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])


def _heads(roles: Mapping[str, str | int], blocks: list[Block], model: nn.Module) -> Heads:
    if not blocks or "q" not in blocks[0].parts:
        return Heads(0, 0, 0)
    count = roles.get("heads")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"anatomy['heads']={count!r} is not allowed: a number of query heads, beside 'q'")
    weights = dict(model.named_parameters())
    width = blocks[0].parts["q"].of(weights).shape[-2] // count
    return Heads(count, int(roles.get("key_value_heads", count)), width)
