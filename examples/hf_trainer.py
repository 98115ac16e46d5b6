"""A small GPT-2 trained by the Hugging Face Trainer on the standard library's sources, watched by one callback.

python examples/hf_trainer.py [steps]
"""

import argparse
import inspect
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from foreshock.integrations.transformers import WatchCallback

ROWS, CONTEXT = 8, 64


def examples(steps: int) -> list[dict[str, torch.Tensor]]:
    """Rows of a text, characters as tokens."""
    text = torch.tensor([ord(c) % 128 for c in inspect.getsource(argparse)])
    starts = torch.randint(len(text) - CONTEXT, (steps * ROWS,)).tolist()
    return [{"input_ids": text[i : i + CONTEXT], "labels": text[i : i + CONTEXT]} for i in starts]


def show(step: int, readings: dict) -> None:
    """A line where laws have been read: how far the worst is broken, over what rounding explains."""
    ratios = [float(x.max()) for name, x in readings.items() if name.endswith("residual.over_noise")]
    if ratios:
        print(f"step {step}: {len(readings)} readings, laws at most {max(ratios):.2f} of 4.26", flush=True)


def train(steps: int, callback: WatchCallback, bf16: bool = False) -> None:
    """Train a small GPT-2 for some updates; bf16: under autocast."""
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": CONTEXT}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=bf16,
        )
        Trainer(model, arguments, train_dataset=examples(steps), callbacks=[callback]).train()


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 50, WatchCallback(on_readings=show))
