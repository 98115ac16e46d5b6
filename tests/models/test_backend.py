"""Which backend a model gets on which device, and what is said where it cannot have the one it asks for."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from foreshock.models import flash_bits
from foreshock.models.tiles import Tile, Tiles, pinned_tiles
from foreshock.models.transformer import Transformer, TransformerConfig
from tests.models.attention_in_triton import SMALL_TILES

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(**changes):
    shape = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 8, "context_length": 4, "vocab_size": 7}
    return TransformerConfig(**shape | changes)


def test_auto_is_the_kernel_on_a_gpu_and_the_reference_elsewhere():
    assert config(backend="auto").on(CPU) == config(backend="reference")
    assert config(backend="auto").on(GPU) == config(backend="triton", tiles=pinned_tiles(16))
    assert config(backend="auto", n_heads=4).on(GPU).backend == "reference"  # a head dim of 8
    assert config(backend="sdpa").on(GPU) == config(backend="sdpa")


def test_auto_is_the_reference_on_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert config(backend="auto").on(GPU).backend == "reference"


def test_tiles_are_the_given_ones_or_pinned_to_the_head_dim():
    assert config(backend="triton", tiles=SMALL_TILES).on(CPU).tiles == SMALL_TILES
    assert config(backend="triton", d_model=256).on(CPU).tiles == pinned_tiles(128) != pinned_tiles(16)
    model = Transformer(config(backend="triton", tiles=SMALL_TILES))
    assert model.blocks[0].attention.dot_product.tiles == SMALL_TILES


def test_tiles_are_flat_in_the_order_of_the_kernels():
    tiles = Tiles(Tile(16, 32, 1, 2), Tile(32, 16, 4, 3), Tile(64, 128, 8, 1))
    assert tiles.flat() == [16, 32, 1, 2, 32, 16, 4, 3, 64, 128, 8, 1]
    assert replace(tiles, query_gradient=None).flat() == tiles.flat()[:8]


def test_without_determinism_the_kernel_of_the_keys_does_all():
    tiles = config(backend="triton", deterministic=False).on(CPU).tiles
    assert (tiles.query_gradient, tiles.forward) == (None, pinned_tiles(16).forward)
    assert config(backend="triton", deterministic=False, tiles=tiles).on(CPU).tiles == tiles


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"backend": "triton", "tiles": pinned_tiles(16, deterministic=False)},
            "deterministic=True does not fit model.t",
        ),
        (
            {"backend": "triton", "tiles": SMALL_TILES, "deterministic": False},
            "deterministic=False does not fit model.t",
        ),
        (
            {"deterministic": False},
            "model.deterministic=False is not allowed with model.backend='reference': it goes w",
        ),
    ],
)
def test_determinism_that_does_not_fit_tiles_or_backend_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong).on(CPU)


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_tiles_without_the_kernel_are_refused(backend):
    with pytest.raises(ValueError, match=r"model.tiles is not allowed with model.backend='\w+': it goes with 'triton'"):
        config(backend=backend, tiles=SMALL_TILES).on(CPU)


@pytest.mark.parametrize("heads", [4, 1])
def test_a_head_dim_that_the_kernel_does_not_take_is_refused_by_the_fields_that_make_it(heads):
    width = 32 if heads == 4 else 264
    message = f"model.d_model={width} with model.n_heads={heads} is d_head={width // heads}, .*multiple of 8 from 16"
    with pytest.raises(ValueError, match=message):
        config(backend="triton", d_model=width, n_heads=heads).on(CPU)


def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(flash_bits, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"model.backend='triton' is not allowed here: .*set TRITON_INTERPRET=1"):
        config(backend="triton").on(CPU)


def test_the_kernel_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [
        name
        for name in sys.modules
        if name.removeprefix("foreshock.").startswith("models.flash_") and not name.endswith(".flash_faults")
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"model.backend='triton' is not allowed here: .*install foreshock\[gpu\]"):
        config(backend="triton").on(CPU)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_no_model_is_built_before_its_device_is_known(backend):
    with pytest.raises(ValueError, match=f"model.backend='{backend}': the device was not filled in"):
        Transformer(config(backend=backend))
