"""What tells one watched model from another, in its manifest and in a file of thresholds."""

from __future__ import annotations

from typing import Any

from foreshock.models.anatomy import Anatomy


def model_facts(anatomy: Anatomy) -> dict[str, Any]:
    """model: name of its class; parameters: how many; blocks: how many."""
    model = anatomy.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"model": type(model).__name__, "parameters": parameters, "blocks": len(anatomy.blocks)}
