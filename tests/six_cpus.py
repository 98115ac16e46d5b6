"""The tests marked ``numeric`` under six settings of PyTorch's kernels: python -m tests.six_cpus [arguments of pytest].

A setting takes vector instructions away, so that a processor runs the kernels of an older one; how many of the six
differ depends on what it has.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product

SETTINGS = list(product(("default", "avx2", None), ("AVX2", None)))
"""``ATEN_CPU_CAPABILITY`` and ``MKL_ENABLE_INSTRUCTIONS``; None: the processor's own."""
NAMES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def _capability(environment: dict[str, str]) -> str:
    """The vector instructions that PyTorch's own kernels use there."""
    asked = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", asked]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """How many of the settings failed; what failed stands under the setting's line."""
    failed = 0
    for setting in SETTINGS:
        chosen = {name: value for name, value in zip(NAMES, setting, strict=True) if value}
        environment = {name: value for name, value in os.environ.items() if name not in NAMES} | chosen
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-m", "numeric", "--tb=line", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        *rest, outcome = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["no output"]
        label = " ".join(f"{name}={value or 'unset'}" for name, value in zip(NAMES, setting, strict=True))
        label += f" ({_capability(environment)})"
        print(
            f"{label}: {'passed' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if done.returncode:
            failed += 1
            print("\n".join([*(line for line in rest if line.startswith(("FAILED", "ERROR"))), outcome]), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
