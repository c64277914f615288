"""Configuration: defaults in a dataclass, a YAML file over them, ``key=value`` over that.

Each job and model owns one frozen keyword-only dataclass; this module only fills it and checks it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pathflip.errors import ConfigError

T = TypeVar("T")


def load_config(
    cls: type[T],
    *,
    given: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> T:
    """Build ``cls`` from defaults, a YAML file, ``a.b=value`` overrides and explicit values.

    Args:
        cls: A dataclass type; nested dataclasses are addressed with dots. A field whose metadata
            has ``formerly`` is also accepted under that name.
        given: Values that win over everything (command-line flags that were set).
        file: YAML mapping of the same shape.
        overrides: ``key=value`` strings; values are read as YAML.

    Raises:
        ConfigError: Unknown key (naming the nearest one), wrong type, unreadable file.
    """
    from pydantic import TypeAdapter, ValidationError

    values: dict[str, Any] = {}
    if file is not None:
        _merge(values, _read_yaml(file), cls, where=str(file))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"-o {override} has no '='.", hint="Write it as -o key=value.")
        nested: Any = yaml.safe_load(text)
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        _merge(values, nested, cls, where=f"-o {override}")
    _merge(values, dict(given or {}), cls, where="the command line")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if isinstance(nested := values.get(field.name), dict):
            values[field.name] = _over(_default(field), nested)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{where} = {first.get('input')!r} is not valid: {first['msg']}.",
            hint="Check its type and spelling.",
        ) from error


def _read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no mapping of settings.")
    return content


def _merge(into: dict[str, Any], update: Mapping[str, Any], cls: Any, *, where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    formerly = {
        old: name for name, field in fields.items() if (old := field.metadata.get("formerly"))
    }
    hints = _types(cls)
    for given, value in update.items():
        key = formerly.get(given, given)
        if key != given and key in update:
            raise ConfigError(f"{where}: {given} is the former name of {key}; give one of them.")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(fields)}."
            raise ConfigError(f"{where}: there is no setting {key!r}.", hint=hint)
        nested = hints[key]
        if dataclasses.is_dataclass(nested) and isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value, nested, where=where)
        else:
            into[key] = value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _over(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values over those of a default, which need not be those of its class."""
    if not dataclasses.is_dataclass(default):
        return values
    kept = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for key, value in values.items():
        kept[key] = _over(kept[key], value) if isinstance(value, dict) else value
    return kept


def _types(cls: Any) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(cls)
