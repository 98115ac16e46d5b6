"""From a composed configuration to the objects of a run, and the run's identity.

Each config node names its class in ``_target_``; its other keys are the constructor's arguments. They
are checked against the constructor's annotations before anything is built, so that a wrong key or
type fails by name. There is no registry: a new fault or monitor is a class and a YAML that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, ValidationError, create_model

from experiments.data import Corpus, DataConfig
from experiments.optimizer import TrainConfig
from experiments.targets import check_targets, target_class
from faults.base import Fault, Sites
from faults.combined import Combined
from models.arithmetic import ORDINARY
from models.backend import FAULT_SITES
from models.corruption import Corrupted
from models.flash import check_numerics
from models.transformer import Transformer, TransformerConfig
from monitors.base import Monitor, WeightHistory

ROOT = Path(__file__).resolve().parent.parent
RUN_KEYS = ("seed", "fault", "model", "data", "train", "monitor")
"""The nodes of a configuration that determine a run; the others say where it goes and who watches."""

RESULT_SOURCES = (
    "faults/*.py",
    "models/*.py",
    "monitors/*.py",
    "experiments/build.py",
    "experiments/checkpoint.py",
    "experiments/data.py",
    "experiments/gradients.py",
    "experiments/ledger.py",
    "experiments/loop.py",
    "experiments/manifest.py",
    "experiments/optimizer.py",
    "experiments/recorder.py",
    "experiments/stacked_history.py",
    "experiments/stacked_loop.py",
    "experiments/stacked_monitors.py",
    "experiments/stacked_optimizer.py",
    "experiments/stacking.py",
)
"""The files that determine what a run measures."""


def did_you_mean(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'? known: a, b, x)``."""
    if not known:
        return " (it has no keys)"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" ({f'did you mean {close[0]!r}? ' if close else ''}known: {', '.join(known)})"


def _class_of(node: Mapping[str, Any], where: str) -> type:
    target = node.get("_target_")
    if target is None:
        raise ValueError(f"{where} names no _target_ class")
    return target_class(target, f"{where}._target_")


def construct(node: Mapping[str, Any], where: str) -> Any:
    """Build the object that a config node describes. Raises ValueError that names ``where`` and the key."""
    arguments = dict(node)
    cls = _class_of(node, where)
    arguments.pop("_target_")
    # A dataclass field may go by another key in YAML where its own name is taken by a method.
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    key_of = {field.name: field.metadata["key"] for field in fields if "key" in field.metadata}
    hints = get_type_hints(cls if fields else cls.__init__)
    parameters = {
        key_of.get(name, name): (hints.get(name, Any), ... if p.default is p.empty else p.default)
        for name, p in inspect.signature(cls).parameters.items()
    }
    for key in arguments:
        if key not in parameters:
            raise ValueError(f"{where}.{key} is not a key of {cls.__name__}{did_you_mean(key, sorted(parameters))}")
        if arguments[key] == "???":
            raise ValueError(f"{where}.{key} is missing: it has no default")
    nested = {key: _construct_inside(value, f"{where}.{key}") for key, value in arguments.items() if _has_target(value)}
    for key, value in nested.items():
        _check_kind(f"{where}.{key}", value, parameters[key][0])
        del arguments[key], parameters[key]
    schema = create_model(
        cls.__name__, __config__=ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True), **parameters
    )
    try:
        checked = schema.model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (where, *first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"{key} is missing") from None
        if first["type"] == "value_error":  # raised by a dataclass inside this one, which has named the value
            raise ValueError(f"{key}: {first['ctx']['error']}") from None
        raise ValueError(f"{key}={first['input']!r} is not allowed: {first['msg'].lower()}") from None
    field_of = {key: name for name, key in key_of.items()}
    values = {field_of.get(key, key): getattr(checked, key) for key in parameters} | nested
    try:
        return cls(**values)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where.split(".")[0]) else f"{where}: {message}") from None


def _has_target(value: Any) -> bool:
    """Whether a config value is a node with a ``_target_``, or a mapping of such nodes by name."""
    return isinstance(value, Mapping) and (
        "_target_" in value or any(isinstance(v, Mapping) and "_target_" in v for v in value.values())
    )


def _construct_inside(value: Mapping[str, Any], where: str) -> Any:
    if "_target_" in value:
        return construct(value, where)
    return {name: construct(node, f"{where}.{name}") for name, node in value.items()}


def _check_kind(where: str, value: Any, kind: Any) -> None:
    """Raise ValueError where what a ``_target_`` made is not of the kind that is asked for there, a type annotation."""
    if isinstance(value, Mapping) and get_origin(kind) is Mapping:
        for name, one in value.items():
            _check_kind(f"{where}.{name}", one, get_args(kind)[1])
    elif not _is_a(value, kind):
        wanted, made = getattr(kind, "__name__", str(kind)), type(value).__name__
        raise ValueError(f"{where}._target_ is not allowed: it makes a {made}, and a {wanted} is needed")


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(kind))
    return get_origin(kind) is not None or kind is Any or isinstance(value, kind)


@lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 over the files that determine a result, so that a bug fix never republishes stale runs."""
    digest = hashlib.sha256()
    for pattern in RESULT_SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def resolve_device(name: str) -> torch.device:
    """``auto`` becomes cuda where there is one. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device='cuda' is not allowed here: torch sees no CUDA device; use cpu or auto")
    return torch.device(name)


@dataclass(frozen=True)
class Run:
    """Everything that one run needs, checked against each other but not yet on a device.

    left_out_monitors: names of configured monitors that the model cannot have.
    """

    config: Mapping[str, Any]
    seed: int
    fault: Fault
    model_config: TransformerConfig
    train: TrainConfig
    corpus: Corpus
    monitors: Mapping[str, Monitor]
    left_out_monitors: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return resolve_device(self.train.device)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that determines the result: two runs with one identity are one run."""
        tiles = self.model_config.tiles
        return {
            "config": {
                **self.config,
                "model": {
                    **self.config["model"],
                    "vocab_size": self.model_config.vocab_size,
                    "backend": self.model_config.backend,
                    "tiles": tiles and dataclasses.asdict(tiles),
                },
                "train": {
                    **{key: value for key, value in self.config["train"].items() if key != "piece_s"},
                    "device": self.device.type,
                },
            },
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[self.train.precision],
            "data_sha256": self.corpus.digest,
            "torch": torch.__version__.split("+")[0],
            "source_sha256": source_digest(),
        }

    @cached_property
    def run_id(self) -> str:
        """The first 16 hex digits of the identity's SHA-256."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def healthy_sites(self) -> Sites:
        return Sites(batch_size=self.train.batch_size)

    def new_model(self) -> Transformer:
        """The model with this seed's initial weights, on the run's device."""
        generator = torch.Generator().manual_seed(self.seed)
        return Transformer(self.model_config, self.train.precision).initialise(generator).to(self.device)

    def new_history(self) -> WeightHistory:
        return WeightHistory(lookback for monitor in self.monitors.values() for lookback in monitor.lookbacks)


def _check_fit(fault: Fault, model: TransformerConfig, train: TrainConfig) -> None:
    """Raise ValueError where fault, model and length do not fit together, at whichever step that shows."""
    if fault.onset is None:
        return
    for member in fault.faults.values() if isinstance(fault, Combined) else ():
        _check_fit(member, model, train)
    if fault.onset >= train.steps:
        raise ValueError(f"fault.onset={fault.onset} is after the end: train.steps={train.steps}")
    healthy, corrupted, numerics = Sites(batch_size=train.batch_size), (), None
    for step in range(fault.onset, train.steps):
        sites = fault.sites(step, healthy)
        if sites.modules != corrupted:
            corrupted = sites.modules
            Corrupted(_skeleton(model), corrupted)
        if model.backend == "triton" and sites.numerics != numerics:
            numerics = sites.numerics
            for layer in range(model.n_layers):
                check_numerics(numerics.layer(layer), model.tiles)
        sites.numerics.check_fits(model.n_layers, model.n_heads, model.kv_heads)
        changed = sites.numerics.faults or sites.numerics.arithmetic != ORDINARY
        if changed and model.backend not in FAULT_SITES:
            raise ValueError(f"model.backend={model.backend!r} has no fault sites: use {' or '.join(FAULT_SITES)}")
        if sites.modules and train.compile:
            raise ValueError("train.compile=True has no fault sites outside attention: set train.compile=false")
        if sites.balance_scale != 1 and not (model.moe and model.moe.balances):
            raise ValueError(
                "the fault switches off load balancing, but the model has none: it needs model.moe.aux_coef above 0 "
                "or model.moe.bias_update_speed, as model=moe_nano has"
            )
        without_router = replace(sites, lr_scale=replace(sites.lr_scale, router=1.0))
        if not model.moe and sites is not healthy and without_router == healthy != sites:
            raise ValueError("fault.groups=['router'] has no effect on a dense model: choose model=moe_nano")


def _skeleton(model: TransformerConfig) -> Transformer:
    """The model's modules without memory."""
    with torch.device("meta"):
        return Transformer(replace(model, vocab_size=model.vocab_size or 2))


def _fitting(monitors: Mapping[str, Any], model: TransformerConfig) -> tuple[dict[str, Any], list[str]]:
    """The monitors' nodes that fit the model, and the names of those left out.

    "Every monitor", all files of conf/monitor, leaves out the ones that need experts on a dense model. Where
    the configuration chooses among them, asking for such a one is an error.
    """
    unfit = [
        name
        for name, node in sorted(monitors.items())
        if model.moe is None and getattr(_class_of(node, f"monitor.{name}"), "needs_experts", False)
    ]
    every = {path.stem for path in (ROOT / "conf" / "monitor").glob("*.yaml")}
    if unfit and not every <= set(monitors):
        raise ValueError(f"monitor.{unfit[0]} needs experts, and the model has none: leave it out, or model=moe_nano")
    return {name: node for name, node in monitors.items() if name not in unfit}, unfit


def build_run(config: DictConfig | Mapping[str, Any], corpus: Corpus | None = None) -> Run:
    """Check a composed configuration and build its run. ``corpus``: an already loaded one, to share it.

    Raises ValueError or FileNotFoundError with one line that names the key, the value and what is allowed.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    check_targets(plain, plain.get("plugins") or ())
    missing = [key for key in RUN_KEYS if plain.get(key) is None]
    if missing:
        raise ValueError(f"{missing[0]} is missing from the configuration")
    plain = {key: plain[key] for key in RUN_KEYS}
    if isinstance(plain["seed"], bool) or not isinstance(plain["seed"], int) or plain["seed"] < 0:
        raise ValueError(f"seed={plain['seed']!r} is not allowed: an integer from 0")
    model: TransformerConfig = construct(plain["model"], "model")
    data: DataConfig = construct(plain["data"], "data")
    train: TrainConfig = construct(plain["train"], "train")
    fault: Fault = construct(plain["fault"], "fault")
    kinds = {TransformerConfig: model, DataConfig: data, TrainConfig: train, Fault: fault}
    for node, (kind, found) in zip(("model", "data", "train", "fault"), kinds.items(), strict=True):
        _check_kind(node, found, kind)
    model = model.on(resolve_device(train.device))
    _check_fit(fault, model, train)
    if train.compile and model.moe and train.precision != "bf16":
        raise ValueError("train.compile=True is not allowed with experts in FP32: set train.precision=bf16")
    for field in ("micro_batch", "watched_sequences"):
        if getattr(train, field) is not None and model.moe and model.moe.bias_update_speed is not None:
            raise ValueError(
                f"train.{field} is not allowed with model.moe.bias_update_speed: the bias follows a whole batch's loads"
            )
    plain["monitor"], left_out = _fitting(plain["monitor"], model)
    monitors = {name: construct(node, f"monitor.{name}") for name, node in sorted(plain["monitor"].items())}
    for name, monitor in monitors.items():
        _check_kind(f"monitor.{name}", monitor, Monitor)
    names = [signal.name for monitor in monitors.values() for signal in monitor.signals]
    if len(set(names)) != len(names):
        raise ValueError(f"two monitors both emit {next(n for n in names if names.count(n) > 1)!r}")
    corpus = corpus or Corpus(data, model.context_length)
    if model.vocab_size is None:
        model = replace(model, vocab_size=corpus.vocab_size)
    elif model.vocab_size < corpus.vocab_size:
        raise ValueError(f"model.vocab_size={model.vocab_size} is too small: the data has {corpus.vocab_size} tokens")
    return Run(plain, plain["seed"], fault, model, train, corpus, monitors, tuple(left_out))
