"""Which tiles suit a GPU: candidates for every kernel, timed: ``python3 -m experiments.gpu_tiles [out=FOLDER]``.

Experiments never tune: their tiles are pinned in ``models.tiles`` and belong to a run. This is how the pins are
chosen. Needs torch, triton and numpy alone. Writes ``<out>/<device>-tiles.json`` after every piece.

The candidates compile for Hopper with few spilled registers or none. Which is fastest hangs on how far one program's
matrix products hide another's exponentials, and that only a GPU tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from foreshock.experiments.gpu_record import Record, begin, end, first_line
from foreshock.experiments.gpu_speed import Case, in_turns, passes, triton_attention
from foreshock.experiments.usage import show_help
from foreshock.models.numerics import HEALTHY_LAYER
from foreshock.models.tiles import Tile, Tiles, pinned_tiles

DEVICE = torch.device("cuda")
LIMIT_S, LONGEST_PIECE_S = 540.0, 60.0
LENGTH = 4096
"""The shortest sequence at which speed is asked for."""

FORWARD = (Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(64, 128, 4, 2), Tile(64, 64, 4, 3))
KEY_GRADIENT = (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2))
QUERY_GRADIENT = (
    Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 2),
    Tile(128, 32, 8, 2),
    Tile(128, 128, 8, 2),
    Tile(64, 32, 4, 3),
)
ADDING = (Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(128, 128, 8, 2))


@dataclass(frozen=True)
class Question:
    """One kernel at one head dim, and the tiles that it could have. kernel: a field of ``Tiles``."""

    kernel: str
    d_head: int
    candidates: tuple[Tile, ...]
    deterministic: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel}{'' if self.deterministic else ' that adds dQ'}, d_head {self.d_head}"

    @property
    def pinned(self) -> Tiles:
        return pinned_tiles(self.d_head, self.deterministic)


def questions() -> Iterator[Question]:
    for d_head in (64, 128):
        yield Question("forward", d_head, FORWARD)
        yield Question("key_gradient", d_head, ADDING, deterministic=False)
        yield Question("key_gradient", d_head, KEY_GRADIENT)
        yield Question("query_gradient", d_head, QUERY_GRADIENT)


def answer(question: Question, case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of the pass that the kernel is in, by candidate, the fastest first.

    A candidate that cannot run is there with its error's first line; ``ok`` unless it is the pinned one.
    """
    part = "forward" if question.kernel == "forward" else "forward and backward"
    ready, missing = {}, {}
    for tile in question.candidates:
        attend = triton_attention(HEALTHY_LAYER, replace(question.pinned, **{question.kernel: tile}), device)
        try:
            call = passes(attend, case, device)[part]
            call()
            torch.cuda.synchronize()
            ready[str(tile)] = call
        except Exception as error:
            missing[str(tile)] = first_line(error)
    ms = dict(sorted(in_turns(ready).items(), key=lambda item: item[1]))
    pinned = str(getattr(question.pinned, question.kernel))
    return {"ok": pinned not in missing, "ms": ms, "of": part, "pinned": pinned, "missing": missing}


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    path, found = begin(arguments, "gpu_tiles", "-tiles")
    record = Record(path, found, ("tiles",), LIMIT_S, LONGEST_PIECE_S)
    late = [
        question.name
        for question in questions()
        if not record.piece("tiles", question.name, partial(answer, question, Case(LENGTH, question.d_head), DEVICE))
    ]
    end(path, record.finish(late))


if __name__ == "__main__":
    main(sys.argv[1:])
