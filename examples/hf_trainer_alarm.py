"""The training of ``hf_trainer.py`` in BF16, whose attention breaks at a step: its alarms, a line of JSON each.

python examples/hf_trainer_alarm.py [steps] [broken from]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from hf_trainer import train

from foreshock import AlarmRules
from foreshock.integrations.transformers import WatchCallback

HEAD = 1


def without_two_bits(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient (B, heads, T, width) in BF16, with the last two bits of a head's numbers cleared."""
    broken = gradient.clone()
    broken[:, HEAD] = (gradient[:, HEAD].contiguous().view(torch.int16) & -4).view(torch.bfloat16)
    return broken


def break_attention(callback: WatchCallback, first_step: int) -> None:
    """Let dV of PyTorch's attention lose two bits from a step on, as a kernel with a defect would."""
    healthy = F.scaled_dot_product_attention

    def attention(q, k, v, *arguments, **named):
        if callback.watch.steps + 1 >= first_step and v.requires_grad:
            v.register_hook(without_two_bits)
        return healthy(q, k, v, *arguments, **named)

    F.scaled_dot_product_attention = attention


def main(steps: int, first_step: int) -> None:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        rules = AlarmRules(("exact", "non_finite", "universal"), horizon_steps=steps)
        callback = WatchCallback(profile="laws", alarms=rules, out=out)
        break_attention(callback, first_step)
        train(steps, callback, bf16=True)
        print((out / "alarms.jsonl").read_text(), end="")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given + [200, 100][len(given) :]))
