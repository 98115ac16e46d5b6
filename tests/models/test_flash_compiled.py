"""What the kernels become on a Hopper GPU: Triton compiles for it on any machine, and a site without fault is free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreshock.models.arithmetic import ORDINARY, Arithmetic
from foreshock.models.wiring import RIGHT, Wiring

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from foreshock.models.arithmetic import Arithmetic
from foreshock.models.flash import load_kernels
from foreshock.models.flash_arithmetic import KernelArithmetic, encode_arithmetic
from foreshock.models.flash_faults import BACKWARD, FORWARD, constants, encode
from foreshock.models.numerics import AttentionNumerics, SiteFault
from foreshock.models.tiles import pinned_tiles
from foreshock.models.wiring import Wiring

sites = [site.split("-") for site in sys.argv[3:]]
faults = tuple(SiteFault(site, phase, "truncate", 3, share=0.5) for site, phase in sites)
faults = AttentionNumerics(faults, wirings=(eval(sys.argv[2]),)).layer(0)
tiles = pinned_tiles(16)
way = KernelArithmetic(*encode_arithmetic(eval(sys.argv[1]), tiles.forward.keys))
TYPES = {"T": "i32", "faults_ptr": "*fp64", "nonfinite_ptr": "*i64"}
TYPES |= dict.fromkeys(("lse_ptr", "delta_ptr", "dq_sum_ptr"), "*fp32")


def compile_for_hopper(kernel, pass_, tile, adds_dq=False):
    sizes = dict(SCALE=0.25, WINDOW=0, D=16, BLOCK_D=16, ROWS=tile.queries, COLS=tile.keys, HEADS=4, KV_HEADS=2)
    sizes |= dict(PV_BLOCK=int(way.pv_block), STORED_FP32=bool(way.stored_fp32), OFFSET=way.offset, BETA=way.beta)
    sizes |= dict(FAULTS=constants(*encode(faults), pass_), ADDS_DQ=adds_dq)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in sizes else TYPES.get(name, "*bf16") for name in names}
    values = {(i,): sizes[name] for i, name in enumerate(names) if name in sizes}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(kernel, signature, values, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


kernels = load_kernels(torch.device("cuda"))
for kernel, pass_, tile, *adds_dq in (
    (kernels.forward, FORWARD, tiles.forward),
    (kernels.delta_of_p if way.delta_of_p else kernels.delta, BACKWARD, tiles.query_gradient),
    (kernels.key_gradient, BACKWARD, tiles.key_gradient),
    (kernels.query_gradient, BACKWARD, tiles.query_gradient),
    (kernels.key_gradient, BACKWARD, pinned_tiles(16, deterministic=False).key_gradient, True),
    (kernels.query_sum, BACKWARD, tiles.forward),
):
    ptx = compile_for_hopper(kernel, pass_, tile, *adds_dq)
    print("wgmma.mma_async" in ptx, ".f64" in ptx, "atom." in ptx)
"""

MATRICES, ADDING, TABLE_READ, FAULT_COUNTED, NOTHING = (
    (True, False, False),
    (True, False, True),
    (True, True, False),
    (True, True, True),
    (False, False, False),
)


def compiled(*sites, arithmetic=ORDINARY, wiring=RIGHT):
    """(tensor cores, a place in FP64 or a table of faults, atomics) of the four kernels of a deterministic run, then
    of the two that take the place of the last.
    """
    command, environment = (
        [sys.executable, "-c", COMPILE, repr(arithmetic), repr(wiring), *sites],
        {**os.environ, "TRITON_INTERPRET": "0"},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(word == "True" for word in line.split()) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("sites", "found"),
    [
        ((), [MATRICES, NOTHING, MATRICES, MATRICES, ADDING, NOTHING]),
        (
            ("p-forward", "ds-backward"),
            [FAULT_COUNTED, NOTHING, TABLE_READ, FAULT_COUNTED, FAULT_COUNTED, NOTHING],
        ),
    ],
)
def test_kernels_compile_for_hopper_and_only_a_fault_s_own_kernels_read_it(sites, found):
    """The kernel of dK and dV corrupts dS as well, but leaves the counting to that of dQ."""
    assert compiled(*sites) == found


@pytest.mark.parametrize(
    "arithmetic",
    [
        Arithmetic("bf16", 128, stored_o="fp32", row_max="offset", offset=0.5),
        Arithmetic("bf16", delta="p", row_max="dynamic", beta=2.0),
    ],
)
def test_every_arithmetic_compiles_for_hopper_and_needs_no_atomic(arithmetic):
    delta = MATRICES if arithmetic.delta == "p" else NOTHING
    assert compiled(arithmetic=arithmetic)[:4] == [MATRICES, delta, MATRICES, MATRICES]


def test_a_shifted_mask_is_read_by_the_kernels_that_mask_and_needs_no_atomic():
    """Each head's from the table; a scale is a constant of the kernel."""
    shifted = compiled(wiring=Wiring(mask_shift=1, heads=(2,), scalings=2))
    assert shifted == [TABLE_READ, NOTHING, TABLE_READ, TABLE_READ, FAULT_COUNTED, NOTHING]
