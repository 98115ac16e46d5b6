"""GPT-2 124M on a GPU: tokens a second of training, and what monitors cost: ``make gpu-gpt2``.

    python3 -m experiments.bench_gpt2 [device=cuda] [size=gpt2_124m] [out=results/gpu] [limit_s=480]

Model, training and fault are those of ``scale=gpu`` (``conf/{model/gpt2_124m,train/gpt2,fault/bf16_shift}.yaml``), the
monitors all of ``conf/monitor`` at their own cadences, the tokens random. Needs torch, triton, numpy, PyYAML and scipy.
Writes ``<out>/<device>-gpt2.json`` after every piece, what matters most first, and begins none near its limit.
``size=tiny`` is a rehearsal of the same pieces, on a CPU too. Exit code: 0, 1 if a piece failed, 2 where nothing can
be measured.
"""

from __future__ import annotations

import gc
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from foreshock.experiments.gpt2_pieces import pieces
from foreshock.experiments.gpt2_sizes import SIZES, Size
from foreshock.experiments.gpu_record import ROOT, Record, check_gpu, end, file_name, machine
from foreshock.experiments.usage import fail, show_help

LIMIT_S = 480.0
LONGEST_PIECE_S = 100.0
GOALS = {"tokens_per_s": "at least 400,000", "share_of_step": "at most 0.02"}


def measure(size: Size, record: Record) -> list[str]:
    """Every piece that there is time for; the names of those that failed."""
    late = []
    for part, name, work in pieces(size):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not record.piece(part, name, work):
            late.append(name)
    return record.finish(late)


def _found(device: str) -> dict[str, Any]:
    if device == "cuda":
        return machine()
    return {"device": "cpu", "python": platform.python_version(), "torch": torch.__version__}


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = {"device": "cuda", "size": "gpt2_124m", "out": str(ROOT / "results" / "gpu"), "limit_s": str(LIMIT_S)}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given or not value:
            fail(f"{argument!r} is not allowed: {', '.join(f'{name}=...' for name in given)}")
        given[key] = value
    device, name = given["device"], given["size"]
    if device not in ("cpu", "cuda"):
        fail(f"device={device!r} is not allowed: cpu or cuda")
    if name not in SIZES:
        fail(f"size={name!r} is not allowed: {' or '.join(SIZES)}")
    if device == "cuda":
        check_gpu("device='cuda'", "; device=cpu size=tiny rehearses")
    if device == "cpu" and name != "tiny":
        fail(f"size={name!r} is not allowed with device='cpu', where it would take hours: size=tiny")
    try:
        limit_s = float(given["limit_s"])
    except ValueError:
        limit_s = math.nan
    if not 0 < limit_s < math.inf:
        fail(f"limit_s={given['limit_s']!r} is not allowed: seconds, above 0")
    torch.set_num_threads(1)
    found, size = _found(device), SIZES[name](device)
    path = Path(given["out"]) / file_name(found["device"], "-gpt2" if name == "gpt2_124m" else "-gpt2-tiny")
    record = Record(path, found, ("steps", "monitors", "profile"), limit_s, LONGEST_PIECE_S)
    record.results |= {"size": name, "batch_size": size.train.batch_size, "goals": GOALS}
    end(path, measure(size, record))


if __name__ == "__main__":
    main(sys.argv[1:])
