"""Values of a configuration held against what is allowed: a mistake is one line that names the field. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from foreshock.experiments.names import repeated

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234663852886e38
"""The largest numbers of int32 and FP32, in which kernels count and compute."""

LARGEST_SEED = 2**63 - 1
"""The largest seed that torch's generators and a table's integers take."""

LONGEST_SHOWN = 60
"""Characters of a value that a message repeats."""

Schema = TypeVar("Schema", bound=BaseModel)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'? known: a, b, x)``."""
    if not known:
        return " (it has no keys)"
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f" ({f'did you mean {close[0]!r}? ' if close else ''}known: {', '.join(known)})"


def nearest(word: Any, known: Iterable[Any]) -> str:
    """``; the nearest are 'x', 'y'``; nothing where none is near."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=3, cutoff=0.5)
    if not close:
        return ""
    return f"; the nearest {'is' if len(close) == 1 else 'are'} {', '.join(map(repr, close))}"


def shown(value: Any) -> str:
    """A value as a message repeats it, None as YAML has it: cut where it is long."""
    said = "null" if value is None else repr(value)
    return said if len(said) <= LONGEST_SHOWN else f"{said[:LONGEST_SHOWN]}..."


def check_numbers(value: Any, where: str) -> None:
    """Raises ValueError where a number, alone or in a list or mapping, is not finite, or larger than a kernel holds."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            check_numbers(child, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for child in value:
            check_numbers(child, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value} is not allowed: a finite number")
    elif isinstance(value, (int, float)):
        largest = LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT
        if abs(value) > largest:
            raise ValueError(f"{where}={shown(value)} is not allowed: at most {largest} in size")


def check_mapping(node: Any, where: str) -> None:
    """Raises ValueError where a node is a value, not keys with values."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{where}={shown(node)} is not allowed: keys with values")


def check_seed(seed: Any, where: str) -> None:
    """Raises ValueError where a seed is no integer from 0 to ``LARGEST_SEED``."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"{where}={shown(seed)} is not allowed: an integer from 0 to {LARGEST_SEED}")


def check_named(names: Iterable[Any], known: Iterable[Any], where: str) -> None:
    """Raises ValueError for the first name that is not known, with those that are and the nearest ones."""
    known = list(known)
    for name in names:
        if name not in known:
            allowed = f"one of {', '.join(map(str, known))}" if known else "there is none"
            raise ValueError(f"{where}={shown(name)} is not allowed: {allowed}{nearest(name, known)}")


def distinct(names: list[Any]) -> list[Any]:
    """The names of a schema's field. Raises pydantic's error for one that stands there twice."""
    twice = repeated(names)
    if twice is not None:
        raise PydanticCustomError("repeated", "{twice} stands there twice", {"twice": str(twice)})
    return names


Distinct = Annotated[list[str], AfterValidator(distinct)]
"""Names, each once."""


def _one_or_several(names: Any) -> Any:
    named = [names] if isinstance(names, str) else names
    if not isinstance(named, list) or not named or not all(isinstance(name, str) and name for name in named):
        raise PydanticCustomError("one_or_several", "a name or a list of names")
    return names if isinstance(names, str) else distinct(names)


OneOrSeveral = Annotated[Any, BeforeValidator(_one_or_several)]
"""A name, or a list of names, each once."""


class Node(BaseModel):
    """A node of a configuration: its keys are the fields; an unknown one is a mistake, with the nearest match."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, node: Any) -> Any:
        for key in node if isinstance(node, Mapping) and cls.model_config.get("extra") != "allow" else ():
            if key not in cls.model_fields:
                said = did_you_mean(key, sorted(cls.model_fields))
                raise PydanticCustomError("unknown_key", "{said}", {"key": str(key), "said": said})
        return node


BOUNDS = {"greater_than_equal": "at least", "greater_than": "above", "less_than_equal": "at most", "less_than": "below"}
"""Pydantic's names of a passed bound, which stand among a mistake's values in short (``ge``), and what they mean."""


def _allowed(mistake: Mapping[str, Any]) -> str:
    kind, values = mistake["type"], mistake.get("ctx", {})
    if kind in BOUNDS:
        return f"{BOUNDS[kind]} {next(iter(values.values()))}"
    if kind == "finite_number":
        return "a finite number"
    if kind == "literal_error":
        return f"one of {values['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    if kind in ("string_too_short", "too_short"):
        return "not empty"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "keys with values"
    return mistake["msg"].lower()


def first_mistake(error: ValidationError, where: str) -> str:
    """The first mistake that pydantic found, in one line that begins with the field."""
    mistake = error.errors()[0]
    path = mistake["loc"][:-1] if mistake["loc"] and isinstance(mistake["loc"][-1], int) else mistake["loc"]
    key = ".".join(str(part) for part in (where, *path) if part != "")
    if mistake["type"] == "missing":
        return f"{key} is missing"
    if mistake["type"] == "unknown_key":
        unknown = ".".join(part for part in (key, mistake["ctx"]["key"]) if part)
        return f"{unknown} is not a key of the configuration{mistake['ctx']['said']}"
    if mistake["type"] == "value_error":  # raised by a class inside this one, which has named the value
        return f"{key}: {mistake['ctx']['error']}"
    return f"{key}={shown(mistake['input'])} is not allowed: {_allowed(mistake)}"


def check_node(schema: type[Schema], node: Any, where: str) -> Schema:
    """A node of plain values as its schema has it. Raises ValueError in one line."""
    check_numbers(node, where)
    try:
        return schema.model_validate(node)
    except ValidationError as error:
        raise ValueError(first_mistake(error, where)) from None


def check_value(kind: Any, value: Any, where: str) -> None:
    """Raises ValueError, in one line, where a plain value is not of a kind, an annotation."""
    check_numbers(value, where)
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(first_mistake(error, where)) from None


Parameter = tuple[Any, Any]
"""The type of a parameter and its default, ``...`` for none."""


@functools.cache
def parameters_of(make: Callable[..., Any]) -> Mapping[str, Parameter]:
    """The parameters of a class or function by name."""
    plain_class = isinstance(make, type) and not dataclasses.is_dataclass(make)
    hints = get_type_hints(make.__init__ if plain_class else make)
    parameters = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default)
        for name, p in inspect.signature(make).parameters.items()
    }
    return MappingProxyType(parameters)


_SCHEMAS: dict[tuple[Any, ...], tuple[Mapping[str, Parameter], type[BaseModel]]] = {}
"""By name and parameters, which are kept too: while they are there, no other object has their identities."""


def _schema(name: str, parameters: Mapping[str, Parameter]) -> type[BaseModel]:
    """What pydantic checks arguments with. Making one takes pydantic longer than all its checks of a configuration.

    A schema is known by which parameters it has, not by their values: ``1`` equals ``True``, and a default may be a
    list. So it is found again for parameters of ``parameters_of``, which are the same objects at every call.
    """
    key = (name, *((field, id(parameter)) for field, parameter in parameters.items()))
    if key not in _SCHEMAS:
        settings = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
        fields: dict[str, Any] = dict(parameters)
        _SCHEMAS[key] = (fields, create_model(name, __config__=settings, **fields))
    return _SCHEMAS[key][1]


def check_arguments(
    name: str, parameters: Mapping[str, Parameter], arguments: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Plain values as the types of what they are arguments of; a list becomes a tuple where that is the type.

    parameters: those of ``parameters_of`` by name, all or some. Raises ValueError in one line.
    """
    for key, value in arguments.items():
        if key not in parameters:
            raise ValueError(f"{where}.{key} is not a key of {name}{did_you_mean(key, sorted(parameters))}")
        if value == "???":
            raise ValueError(f"{where}.{key} is missing: it has no default")
        check_numbers(value, f"{where}.{key}")
    try:
        checked = _schema(name, parameters).model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        raise ValueError(first_mistake(error, where)) from None
    return {key: getattr(checked, key) for key in parameters}


def called(make: Callable[[], Any], where: str, keys: Iterable[str]) -> Any:
    """What ``make`` returns; a ValueError of it names the field as the configuration does, ``where.key=...``."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(placed(str(error), where, keys)) from None


def placed(message: str, where: str, keys: Iterable[str]) -> str:
    """A class's message about one of its keys with the whole path to it: ``bits=9 ...`` -> ``fault.bits=9 ...``."""
    field, equals, rest = message.partition("=")
    path, _, key = field.rpartition(".")
    if equals and key in keys and where.startswith(path):
        return f"{where}.{key}={rest}"
    return message if message.startswith(where.split(".")[0]) else f"{where}: {message}"
