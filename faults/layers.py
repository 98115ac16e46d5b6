"""The layers that a fault reaches: indices, or None for all."""

from __future__ import annotations

Layers = tuple[int, ...] | None


def check_layers(layers: Layers) -> None:
    """Raise ValueError for none, for one that is named twice and for a negative index."""
    if layers is not None and (not layers or len(set(layers)) != len(layers) or min(layers) < 0):
        raise ValueError(f"fault.layers={list(layers)} is not allowed: distinct indices from 0, or null for all")


def check_layers_fit(layers: Layers, n_layers: int) -> None:
    """Raise ValueError for a layer that a model does not have."""
    if layers is not None and max(layers) >= n_layers:
        raise ValueError(
            f"fault.layers={list(layers)} does not fit the model: it has {n_layers} layers, 0 to {n_layers - 1}"
        )


def share_a_layer(layers: Layers, others: Layers) -> bool:
    """Whether two choices have a layer in common."""
    return layers is None or others is None or bool(set(layers) & set(others))
