"""Configuration: defaults in a dataclass, a YAML file over them, ``key=value`` over that.

Each job and model owns one frozen keyword-only dataclass; this module only fills it and checks it.
``null`` sets what may be empty to None, and any other setting back to its default, so that a flag
or an override can undo what a file set.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from pathflip.errors import ConfigError

T = TypeVar("T")


def load_config(
    cls: type[T],
    *,
    base: T | Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> T:
    """Build ``cls`` from defaults, a YAML file, ``a.b=value`` overrides and explicit values.

    Args:
        cls: A dataclass type; nested dataclasses are addressed with dots. A field whose metadata
            has ``formerly`` is also accepted under that name.
        base: Defaults over those of the class, as of a preset.
        given: Values that win over everything (command-line flags that were set).
        file: YAML mapping of the same shape.
        overrides: ``key=value`` strings; values are read as YAML.

    Raises:
        ConfigError: Unknown key (naming the nearest one), wrong type, unreadable file.
    """
    from pydantic import TypeAdapter, ValidationError

    under: dict[str, Any] = {}
    if isinstance(base, Mapping):
        _merge(under, base, cls, where="the preset")
    elif base is not None:
        under = {field.name: getattr(base, field.name) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if file is not None:
        _merge(values, read_yaml(file), cls, where=str(file))
    for override in overrides:
        _merge(values, _parsed(override), cls, where=f"-o {override}")
    _merge(values, dict(given or {}), cls, where="the command line")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        layers = [layer[field.name] for layer in (under, values) if field.name in layer]
        if layers:
            values[field.name] = functools.reduce(_over, layers, _default(field))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(
                f"{where} is not set.", hint=f"Set it in the file or with -o {where}=…."
            ) from error
        raise ConfigError(
            f"{where} = {first.get('input')!r} is not valid: {first['msg']}.",
            hint="Check its type and spelling.",
        ) from error


def check_positive(config: Any, *names: str) -> None:
    """Refuse settings below 1; None passes.

    Args:
        config: A configuration.
        names: Its settings to check.

    Raises:
        ConfigError: One of them is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}.", hint="It must be 1 or more.")


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: It cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} does not hold settings.", hint="Write one setting a line, as key: value."
        )
    return content


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-05 is a number, as in YAML 1.2; PyYAML follows 1.1, where it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    return yaml.load(text, _Loader)


def _parsed(override: str) -> dict[str, Any]:
    """An override ``a.b=value`` as a nested mapping."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"-o {override} has no '='.", hint="Write it as -o key=value.")
    try:
        nested: Any = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"The value of -o {override} is not valid YAML.",
            hint="Quote it if it is text with special characters: -o 'key=\"value\"'.",
        ) from error
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(into: dict[str, Any], update: Mapping[str, Any], cls: Any, *, where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    formerly = {
        old: name for name, field in fields.items() if (old := field.metadata.get("formerly"))
    }
    hints = get_type_hints(cls)
    for given, value in update.items():
        key = formerly.get(given, given)
        if key != given and key in update:
            raise ConfigError(f"{where}: {given} is the former name of {key}; give one of them.")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(fields)}."
            raise ConfigError(f"{where}: there is no setting {key!r}.", hint=hint)
        nested = hints[key]
        if value is None and not _may_be_none(nested):
            into.pop(key, None)
        elif dataclasses.is_dataclass(nested) and isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, nested, where=where)
        else:
            into[key] = value


def _may_be_none(hint: Any) -> bool:
    return hint is Any or hint is None or NoneType in get_args(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _over(default: Any, value: Any) -> Any:
    """Values over those of a default, which need not be those of its class."""
    if not isinstance(value, dict):
        return value
    kept = {}
    if dataclasses.is_dataclass(default):
        kept = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    elif isinstance(default, dict):
        kept = default
    return kept | {key: _over(kept.get(key), one) for key, one in value.items()}
