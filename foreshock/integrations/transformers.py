"""A callback of the Hugging Face ``Trainer``.

    Trainer(model, arguments, train_dataset=data, callbacks=[WatchCallback(profile="laws", out="trace")]).train()

The watch opens when training begins, with the optimizer that ``Trainer`` has made, and reads at ``on_optimizer_step``:
the update has been made and gradients are still there, which ``Trainer`` clears right after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from foreshock.integrations import missing
from foreshock.models.anatomies.watched_rows import COUNT

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from foreshock.integrations.accelerate import attach
except ModuleNotFoundError as error:
    raise missing("transformers", error) from None

if TYPE_CHECKING:
    from foreshock.attaching.options import Given
    from foreshock.attaching.watch import AttachedWatch


class WatchCallback(TrainerCallback):
    """Watches a ``Trainer``; options: those of ``foreshock.attach`` (``foreshock.attaching.options.Options``).

    watch: of the training in progress or of the last, None before. The loss is the one that the model returns, mean
    nats a token over the micro-batches of an update, of this process. Training raises RuntimeError at its first update
    where the model returns none, as with ``compute_loss_func`` or ``label_smoothing_factor``.
    """

    def __init__(self, **options: Unpack[Given]) -> None:
        self.watch: AttachedWatch | None = None
        self._options = options
        self._losses: list[Tensor] = []
        self._shares = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        """Open a watch; one that a broken training has left open is closed."""
        self._close()
        self._losses.clear()
        self.watch = attach(model, optimizer, state.global_step, **self._options)
        handle = model.register_forward_hook(self._keep_loss, with_kwargs=True)
        self.watch.when_closed(handle.remove)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read the update that has just been made."""
        assert self.watch is not None
        if not self._losses:
            raise RuntimeError(
                "WatchCallback: the model returns no loss: leave label_smoothing_factor and compute_loss_func out, and "
                "give it labels"
            )
        losses = torch.stack(self._losses)
        across = args.world_size if self._shares and args.average_tokens_across_devices else 1
        self.watch.step(losses.sum() * across if self._shares else losses.mean())
        self._losses.clear()  # those of the forwards that a monitor has made too

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what is left."""
        self._close()

    def _keep_loss(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Of a forward that trains. With the number of tokens given, micro-batches have shares of one mean."""
        loss = output.get("loss") if isinstance(output, dict) else None
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._losses.append(loss.detach().clone())  # Trainer multiplies it in place
            self._shares = named.get(COUNT) is not None

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()
