"""A callback of Lightning's ``Trainer``.

    Trainer(callbacks=[WatchCallback(profile="laws", out="trace")]).fit(module, data)

The watch opens at ``on_train_start``, after a checkpoint has been loaded, and reads at ``on_train_batch_end`` of each
batch that ended in an update: Lightning clears gradients only in the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

import foreshock
from foreshock.integrations import missing, options_of

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise missing("lightning", error) from None

if TYPE_CHECKING:
    from foreshock.attaching.options import Given
    from foreshock.attaching.watch import AttachedWatch


class WatchCallback(Callback):
    """Watches a fit; options: those of ``foreshock.attach`` (``foreshock.attaching.options.Options``).

    module: the name, inside the LightningModule, of the model that ``training_step`` calls; None for its only child, or
    for itself where it has several. watch: of the fit in progress or of the last, None before. The loss is the one that
    ``training_step`` returns, mean over the batches of an update, of this process. Fitting raises ValueError, before
    its first step, for a module that optimizes by hand or has several optimizers.
    """

    def __init__(self, module: str | None = None, **options: Unpack[Given]) -> None:
        self.watch: AttachedWatch | None = None
        self._module, self._options = module, options
        self._losses: list[Tensor] = []
        self._updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a watch."""
        self._close()
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError(
                f"WatchCallback: {name} optimizes by hand or has several optimizers: call foreshock.attach and "
                "watch.step in its training_step"
            )
        options = options_of(self._options, trainer.is_global_zero, trainer.global_step)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        model = called_by(pl_module, self._module)
        self.watch = foreshock.attach(model, trainer.optimizers[0], **{"scaler": scaler, **options})
        self._losses.clear()
        self._updates = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read, where this batch ended in an update."""
        assert self.watch is not None
        if outputs:  # empty where training_step has skipped the batch
            self._losses.append(outputs["loss"])
        if trainer.global_step == self._updates or not self._losses:
            return
        self._updates = trainer.global_step
        loss = torch.stack(self._losses).mean() * trainer.accumulate_grad_batches  # Lightning has divided by it
        self._losses.clear()
        self.watch.step(loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        self._close()

    def _close(self) -> None:
        if self.watch is not None:
            self.watch.close()


def called_by(module: LightningModule, name: str | None) -> nn.Module:
    """The model that a LightningModule trains. Raises ValueError for a name that it does not have."""
    children = dict(module.named_children())
    if name is not None and name not in dict(module.named_modules()):
        raise ValueError(f"WatchCallback(module={name!r}) is not allowed: one of {', '.join(children)}")
    if name is not None:
        return module.get_submodule(name)
    with_weights = [child for child in children.values() if any(True for _ in child.parameters())]
    return with_weights[0] if len(with_weights) == 1 else module
