"""From a composed configuration to the objects of a run, and the run's identity.

Each config node names its class in ``_target_``; its other keys are the constructor's arguments. They
are checked against the constructor's annotations before anything is built, so that a wrong key or
type fails by name. There is no registry: a new fault or monitor is a class and a YAML that names it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from omegaconf import DictConfig, OmegaConf

import foreshock.experiments.default_monitors  # noqa: F401  # from here on `monitor: all` can be composed
from foreshock.experiments.ranges import check_ranges
from foreshock.experiments.targets import check_targets, target_class
from foreshock.experiments.training.data import Corpus, DataConfig
from foreshock.experiments.training.equivalences import canonical
from foreshock.experiments.training.identity import (
    WITHOUT_EFFECT,
    fault_sources,
    identifier,
    observation_id,
    training_sources,
    without_added,
    without_labels,
)
from foreshock.experiments.training.single_engine import SingleEngine
from foreshock.experiments.training.source_code import digest_of
from foreshock.experiments.training.train_config import TrainConfig
from foreshock.experiments.validation import called, check_arguments, check_mapping, check_seed, parameters_of
from foreshock.faults.base import Fault, Sites
from foreshock.faults.fit import check_fits
from foreshock.faults.lookback import past_of
from foreshock.models.anatomy import Anatomy
from foreshock.models.precision import DTYPES
from foreshock.models.transformer import Transformer, TransformerConfig, skeleton
from foreshock.monitors.base import Monitor, Signal, cadences, described_signals

ROOT = Path(__file__).resolve().parent.parent
RUN_KEYS = ("seed", "fault", "model", "data", "train", "monitor")
"""The nodes of a configuration that describe a run; the others say where it goes."""


def _class_of(node: Mapping[str, Any], where: str) -> type:
    check_mapping(node, where)
    target = node.get("_target_")
    if target is None:
        raise ValueError(f"{where} names no _target_ class")
    return target_class(target, f"{where}._target_")


def construct(node: Mapping[str, Any], where: str) -> Any:
    """Build the object that a config node describes. Raises ValueError that names ``where`` and the key."""
    cls = _class_of(node, where)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    # A dataclass field may go by another key in YAML where its own name is taken by a method.
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    key_of = {field.name: field.metadata["key"] for field in fields if "key" in field.metadata}
    parameters = {key_of.get(name, name): parameter for name, parameter in parameters_of(cls).items()}
    nested = {
        key: _construct_inside(value, f"{where}.{key}")
        for key, value in arguments.items()
        if key in parameters and _has_target(value)
    }
    for key, value in nested.items():
        _check_kind(f"{where}.{key}", value, parameters[key][0])
    plain = {key: value for key, value in arguments.items() if key not in nested}
    expected = {key: parameter for key, parameter in parameters.items() if key not in nested}
    checked = check_arguments(cls.__name__, expected, plain, where)
    field_of = {key: name for name, key in key_of.items()}
    values = {field_of.get(key, key): value for key, value in (checked | nested).items()}
    return called(lambda: cls(**values), where, parameters)


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
        lacks = [name for name in _members(kind) if not hasattr(value, name)]
        why = f": it has no {', no '.join(lacks)}" if lacks else ""
        raise ValueError(f"{where}._target_ is not allowed: it makes a {made}, and a {wanted} is needed{why}")


def _members(kind: Any) -> list[str]:
    """What a protocol asks for; nothing for any other class."""
    if not getattr(kind, "_is_protocol", False):
        return []
    return [*getattr(kind, "__annotations__", {}), *(name for name in vars(kind) if not name.startswith("_"))]


def _is_a(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, part) for part in get_args(kind))
    return get_origin(kind) is not None or kind is Any or isinstance(value, kind)


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

    left_out_monitors: configured monitors that the run cannot have, by name; asked: the configuration that the run
    was built from, from which another process builds it again.
    """

    config: Mapping[str, Any]
    seed: int
    fault: Fault
    model_config: TransformerConfig
    train: TrainConfig
    corpus: Corpus
    monitors: Mapping[str, Monitor]
    left_out_monitors: Mapping[str, Monitor] = dataclasses.field(default_factory=dict)
    asked: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def signals(self) -> dict[str, Signal]:
        """Every signal that a configured monitor has, by name, those of ``left_out_monitors`` among them."""
        configured = (*self.monitors.values(), *self.left_out_monitors.values())
        return {signal.name: signal for monitor in configured for signal in described_signals(monitor)}

    @property
    def device(self) -> torch.device:
        return resolve_device(self.train.device)

    @cached_property
    def nodes(self) -> dict[str, Any]:
        """The run's configuration with everything filled in that this machine and the data decide."""
        tiles = self.model_config.tiles
        found = {
            "vocab_size": self.model_config.vocab_size,
            "backend": self.model_config.backend,
            "tiles": tiles and dataclasses.asdict(tiles),
        }
        train = {key: value for key, value in self.config["train"].items() if key != "piece_s"}
        train["device"] = self.device.type
        return {**self.config, "model": {**self.config["model"], **found}, "train": train}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that determines the weights at every step: two runs with one identity are one run."""
        return {
            "config": {
                "seed": self.nodes["seed"],
                "model": without_added(self.nodes["model"]),
                "fault": without_labels(self.nodes["fault"]),
                "train": {key: value for key, value in self.nodes["train"].items() if key not in WITHOUT_EFFECT},
                "data": {
                    "held_out": self.corpus.config.held_out
                },  # where it lies and how it is read has made data_sha256
            },
            "dtype": str(DTYPES[self.train.precision]).removeprefix("torch."),
            "data_sha256": self.corpus.digest,
            "torch": torch.__version__.split("+")[0],
            "source_sha256": canonical(digest_of(training_sources(self.nodes))),
            "fault_sha256": canonical(digest_of(fault_sources(self.nodes["fault"]))),
        }

    @cached_property
    def run_id(self) -> str:
        """The trajectory's: the first 16 hex digits of the identity's SHA-256."""
        return identifier(self.identity)

    @cached_property
    def observations(self) -> dict[str, str]:
        """By monitor, the identity of what it reads of this trajectory."""
        return {
            name: observation_id(self.run_id, self.config["monitor"][name], cadences(monitor))
            for name, monitor in self.monitors.items()
        }

    def healthy_sites(self) -> Sites:
        return Sites(batch_size=self.train.batch_size)

    def new_model(self) -> Transformer:
        """The model with this seed's initial weights, on the run's device."""
        generator = torch.Generator().manual_seed(self.seed)
        return Transformer(self.model_config, self.train.precision).initialise(generator).to(self.device)

    def new_engine(self) -> SingleEngine:
        """The engine that trains this run by itself."""
        past = past_of(self.fault, self.model_config, self.train)
        return SingleEngine(self.new_model(), self.train, self.corpus, self.seed, past=past)


def _left_out(monitors: Mapping[str, Monitor], model: TransformerConfig, precision: str) -> list[str]:
    """The names of the configured monitors that need what the run lacks: those of routers, on a dense model,
    and of the loss scale, without FP16.

    A configuration with most files of conf/monitor asks for whatever fits. One with fewer chooses among them, and
    choosing one that does not fit is an error.
    """
    anatomy = Anatomy.of(skeleton(model))
    unfit = {
        name: f"needs the role {role!r}, and the model has none"
        for name, monitor in monitors.items()
        if (role := monitor.needs.lacking(anatomy))
    }
    unfit |= {
        name: "reads the loop of foreshock.attach alone" for name, monitor in monitors.items() if monitor.needs.attached
    }
    if precision != "fp16":
        unfit |= {
            name: "reads the loss scale of train.precision=fp16 alone"
            for name, monitor in monitors.items()
            if monitor.needs.scaled
        }
    every = {path.stem for path in (ROOT / "conf" / "monitor").glob("*.yaml")}
    if unfit and len(every & set(monitors)) <= len(every) / 2:
        name, reason = next(iter(unfit.items()))
        raise ValueError(f"monitor.{name} {reason}: leave it out")
    return list(unfit)


def build_run(config: DictConfig | Mapping[str, Any], load: Callable[[DataConfig, int], Corpus] = Corpus) -> Run:
    """Check a composed configuration and build its run. load: gives a corpus, for runs that share theirs.

    Raises ValueError or FileNotFoundError with one line that names the key, the value and what is allowed.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    check_targets(plain, plain.get("plugins") or ())
    missing = next((key for key in RUN_KEYS if key not in plain), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing from the configuration")
    asked = {key: plain[key] for key in RUN_KEYS} | {"plugins": plain.get("plugins") or []}
    plain = {key: plain[key] for key in RUN_KEYS}
    check_seed(plain["seed"], "seed")
    model: TransformerConfig = construct(plain["model"], "model")
    data: DataConfig = construct(plain["data"], "data")
    train: TrainConfig = construct(plain["train"], "train")
    fault: Fault = construct(plain["fault"], "fault")
    kinds = {TransformerConfig: model, DataConfig: data, TrainConfig: train, Fault: fault}
    for node, (kind, found) in zip(("model", "data", "train", "fault"), kinds.items(), strict=True):
        _check_kind(node, found, kind)
    model = model.on(resolve_device(train.device))
    check_ranges(model, train)
    check_fits(fault, model, train)
    if train.compile and model.moe and train.precision == "fp32":
        raise ValueError("train.compile=True is not allowed with experts in FP32: set train.precision=bf16 or fp16")
    if train.compile and model.dropout:
        raise ValueError(f"train.compile=True is not allowed with model.dropout={model.dropout}: set one of them off")
    for field in ("micro_batch", "watched_sequences"):
        if getattr(train, field) is not None and model.moe and model.moe.bias_update_speed is not None:
            raise ValueError(
                f"train.{field} is not allowed with model.moe.bias_update_speed: the bias follows a whole batch's loads"
            )
    check_mapping(plain["monitor"], "monitor")
    every = {name: construct(node, f"monitor.{name}") for name, node in sorted(plain["monitor"].items())}
    for name, monitor in every.items():
        _check_kind(f"monitor.{name}", monitor, Monitor)
    left_out = _left_out(every, model, train.precision)
    plain["monitor"] = {name: node for name, node in plain["monitor"].items() if name not in left_out}
    monitors = {name: monitor for name, monitor in every.items() if name not in left_out}
    names = [signal.name for monitor in monitors.values() for signal in monitor.signals]
    if len(set(names)) != len(names):
        raise ValueError(f"two monitors both emit {next(n for n in names if names.count(n) > 1)!r}")
    try:
        corpus = load(data, model.context_length)
    except PermissionError as error:
        said = f"this process may not read {error.filename!r}"
        raise ValueError(f"data.path={data.path!r} is not allowed: {said}") from None
    if model.vocab_size is None:
        model = replace(model, vocab_size=corpus.vocab_size)
    elif model.vocab_size < corpus.vocab_size:
        raise ValueError(f"model.vocab_size={model.vocab_size} is too small: the data has {corpus.vocab_size} tokens")
    return Run(
        plain, plain["seed"], fault, model, train, corpus, monitors, {name: every[name] for name in left_out}, asked
    )
