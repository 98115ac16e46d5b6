"""A short training of a tiny GPT-2 by the Hugging Face ``Trainer``, offline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.attaching.hugging_face import batches, model_of

ROWS = 4


def data(steps: int, parts: int = 1) -> list[dict[str, Tensor]]:
    """Examples for some updates, in the order in which they are used; the later rows of each batch are shorter."""
    rows = torch.cat(batches(steps * parts, ROWS))
    labels = rows.clone()
    for place in range(0, len(rows), 3):
        labels[place, 20:] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def fit(folder: Any, steps: int, callback: Any = None, parts: int = 1, **arguments: Any) -> nn.Module:
    """Train; parts: micro-batches of an update."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = model_of("GPT2")
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=parts,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **arguments,
    )
    InOrder(model, settings, train_dataset=data(steps, parts), callbacks=[callback] if callback else []).train()
    return model


def by_hand(steps: int, parts: int = 1, clip: float = 1.0, **options: Any) -> tuple[nn.Module, Any]:
    """The same training in a loop of one's own, and its watch, closed."""
    import foreshock

    model, examples = model_of("GPT2").train(), data(steps, parts)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0, fused=True)
    watch = foreshock.attach(model, optimizer, quiet=True, **options)
    micro = [examples[i : i + ROWS] for i in range(0, len(examples), ROWS)]
    for step in range(steps):
        of_update = [
            {key: torch.stack([example[key] for example in part]) for key in part[0]}
            for part in micro[step * parts : (step + 1) * parts]
        ]
        count = torch.stack([part["labels"].ne(-100).sum() for part in of_update]).sum()
        losses = []
        for part in of_update:
            loss = model(**part, num_items_in_batch=count).loss
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        watch.step(torch.stack(losses).sum())
        optimizer.zero_grad()
    watch.close()
    return model, watch
