"""Why the natural fault of attention bites or not: its conditions and its effect in the weights of finished runs.

    python -m experiments.natural_rounding report=DIR runs=DIR fault=NAME out=FILE.csv

Takes the final weights of a fault's runs, passes the batches that training would have met next through every kernel
in turn, and writes one row a seed, kernel, quantity, layer and head. The mechanism is that of arXiv:2510.04212
(``models.arithmetic``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from foreshock.analysis.runs.index import read_index
from foreshock.experiments import trace
from foreshock.experiments.build import Run, build_run
from foreshock.experiments.usage import fail, misused, show_help
from foreshock.experiments.validation import check_named
from foreshock.models.arithmetic import ROUNDS_TO_ONE, Arithmetic
from foreshock.models.numerics import HEALTHY, AttentionNumerics, SiteFault, to_bf16_grid
from foreshock.models.taps import Taps
from foreshock.models.transformer import Transformer
from foreshock.monitors.attention_scores import causal_scores, tapped_inputs, window_of

BATCHES = 16
BELOW_FREXP = 9
"""Half a unit in the last place of BF16, which has 8 bits, is 2^-9 of the power of 2 that ``frexp`` gives."""

EXACT_O = AttentionNumerics(arithmetic=Arithmetic(stored_o="fp32"))
"""The yardstick: the backward reads an O in FP32, and all else is stored as ever."""

KERNELS = {
    "fp32": HEALTHY,
    "natural": AttentionNumerics(arithmetic=Arithmetic("bf16")),
    "each": AttentionNumerics(arithmetic=Arithmetic("bf16", 1)),
    "stored_o": AttentionNumerics(arithmetic=Arithmetic("bf16", stored_o="fp32")),
    "delta": AttentionNumerics(arithmetic=Arithmetic("bf16", delta="p")),
    "dynamic": AttentionNumerics(arithmetic=Arithmetic("bf16", row_max="dynamic", beta=2.0)),
    "offset": AttentionNumerics(arithmetic=Arithmetic("bf16", row_max="offset", offset=0.1)),
    "truncated2": AttentionNumerics((SiteFault("o", "backward", "truncate", 2),)),
}
"""The arithmetics of ``experiment=natural_bf16``, and a fault that is known to add up: two bits off the saved O."""


def conditions(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> dict[str, Tensor]:
    """Shares from 0 to 1, each within the one before, of what a single rounding of Pbar V could push off zero.

    tied_rows: of rows (queries) in which BF16 stores more than one Pbar as 1; one_sign: of the elements of O in all
    rows, those of a tied row for which V has one sign over the tied keys, so that their sum may carry; exposed: those
    for which, besides, all other keys add less than half a unit in the last place of Pbar V, enough to break the tie of
    a bit that drops out and not to round by themselves. (Where they add nothing ties go both ways: an upper bound.)
    q, k, v: (layers, B, heads, T, D) in FP32 that hold BF16 numbers; returns (layers, heads). A row with NaN is none.
    """
    s = causal_scores(q, k, window)
    below_maximum = s - s.amax(-1, keepdim=True)
    ones = (below_maximum >= ROUNDS_TO_ONE).to(v.dtype)
    tied = ones.sum(-1, keepdim=True) > 1
    one_sign = tied & ((ones @ v).abs() == ones @ v.abs())
    p_bar = to_bf16_grid(below_maximum.exp())
    half_a_unit = torch.exp2(((p_bar @ v).frexp().exponent - BELOW_FREXP).to(v.dtype))
    exposed = one_sign & (((p_bar - ones) @ v).abs() < half_a_unit)
    shares = {"tied_rows": tied, "one_sign": one_sign, "exposed": exposed}
    return {name: share.to(v.dtype).mean((1, 3, 4)) for name, share in shares.items()}


def alignment(errors: Tensor) -> Tensor:
    """Whether errors add up: n |mean|^2 / mean |.|^2 over the first of two axes, (n, numbers) -> ().

    1 on average where errors of different batches are independent with mean 0, n where all are the same. NaN without
    any error.
    """
    return len(errors) * errors.mean(0).square().sum() / errors.square().sum(1).mean()


Place = tuple[int, int | str]
"""A layer, and a head or a matrix in it."""


def output_bias(q: Tensor, k: Tensor, v: Tensor, o: Tensor, window: int | None) -> Tensor:
    """sum of sign(O') (O - O') over sum of |O'|, O' = softmax(S) V in FP32: above 0 where O is pushed off zero.

    Shapes as ``conditions``; returns (layers, heads). NaN propagates, and 0 / 0 is one.
    """
    exact = causal_scores(q, k, window).softmax(-1) @ v
    return ((o - exact) * exact.sign()).sum((1, 3, 4)) / exact.abs().sum((1, 3, 4))


def one_pass(
    model: Transformer, batch: Tensor, numerics: AttentionNumerics
) -> tuple[dict[str, Tensor], dict[Place, Tensor]]:
    """Forward and backward with one kernel: what its O is like, (layers, heads), and flat gradients of W_Q and W_K."""
    model.zero_grad(set_to_none=True)
    with Taps(model, ["dot_product"]) as tapped:
        loss, auxiliary, _ = model(batch, numerics)
        (loss + auxiliary).backward()
    taps = tapped.at("dot_product").values()
    inputs, window = tapped_inputs(taps, slice(None)), window_of(taps)
    o = torch.stack([tap.out for tap in taps])
    attention = [block.attention for block in model.blocks]
    return (
        conditions(*inputs, window) | {"output_bias": output_bias(*inputs, o, window)},
        {(i, m): getattr(one, m).weight.grad.flatten() for i, one in enumerate(attention) for m in "qk"},
    )


def measure(run: Run, model: Transformer) -> Iterator[tuple[str, str, int, int | str, float]]:
    """(kernel, quantity, layer, head or matrix, value) over all batches: conditions, bias of O, error of gradients.

    The gradient error is relative to the gradient with ``EXACT_O``, and the alignment is that of this error.
    """
    first, of_step = run.train.steps, run.corpus.batch
    steps = range(first, first + BATCHES)
    batches = [torch.from_numpy(of_step(run.seed, step, run.train.batch_size)).to(run.device) for step in steps]
    exact = [one_pass(model, batch, EXACT_O)[1] for batch in batches]
    for kernel, numerics in KERNELS.items():
        readings, got = zip(*(one_pass(model, batch, numerics) for batch in batches), strict=True)
        for quantity in readings[0]:
            mean = torch.stack([reading[quantity] for reading in readings]).mean(0)
            for layer, head in np.ndindex(*mean.shape):
                yield kernel, quantity, layer, head, mean[layer, head].item()
        for layer, matrix in exact[0]:
            right = torch.stack([gradient[layer, matrix] for gradient in exact])
            errors = torch.stack([gradient[layer, matrix] for gradient in got]) - right
            yield kernel, "gradient_error", layer, matrix, (errors.norm() / right.norm()).item()
            yield kernel, "alignment", layer, matrix, alignment(errors).item()


def trained(folder: Path) -> tuple[Run, Transformer]:
    """A finished run and its model with the final weights. Raises TraceError where it is not finished or damaged."""
    manifest = trace.read_manifest(folder)
    if manifest is None or manifest["end_reason"] not in trace.FINAL_REASONS:
        raise trace.TraceError(f"{folder} has no finished run")
    run = build_run(manifest["config"])
    model = run.new_model()
    try:
        weights = load(trace.read_weights(folder))
    except SafetensorError as error:
        raise trace.damaged(folder / trace.WEIGHTS, error, folder) from None
    found = model.load_state_dict(weights, strict=False)
    tied = {"head.weight"} if run.model_config.tie_embeddings else set()
    wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if name not in tied)]
    if wrong:
        raise trace.TraceError(f"{folder}: the weights do not fit the model: {wrong[0]}")
    return run, model


def main(arguments: list[str]) -> None:
    show_help(arguments, __doc__)
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != {"report", "runs", "fault", "out"} or len(given) != len(arguments):
        misused("python -m experiments.natural_rounding report=DIR runs=DIR fault=NAME out=FILE.csv")
    try:
        _write(Path(given["report"]), Path(given["runs"]), given["fault"], Path(given["out"]))
    except (ValueError, OSError, trace.TraceError) as error:
        fail(str(error))


def _write(report: Path, runs: Path, fault: str, out: Path) -> None:
    """The table of the runs of one fault, to a CSV file and, in short, to the terminal."""
    torch.set_num_threads(1)
    index = read_index(report)
    check_named([fault], index["experiment"]["faults"], "fault")
    cells = [cell for cell in index["runs"] if cell["fault"] == fault]
    rows = []
    for cell in cells:
        run, model = trained(runs / cell["run_id"])
        rows += [(cell["model"], cell["seed"], *row) for row in measure(run, model)]
    columns = ["model", "seed", "kernel", "quantity", "layer", "head", "value"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(out, index=False, float_format="%.5g")
    print(table.groupby(["quantity", "kernel"], sort=False)["value"].describe()[["count", "mean", "min", "max"]])


if __name__ == "__main__":
    main(sys.argv[1:])
