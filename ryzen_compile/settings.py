"""Settings as trees of frozen models, read from YAML: unknown keys are refused with the nearest name.

Single settings are replaced by ``a.b=value``, in which the value is YAML again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ryzen_compile.errors import ConfigError
from ryzen_compile.manifest import shown, shown_path

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_CONFIG_BYTES = 1 << 20
MAX_VALUES = 100_000  # with references spelled out, which a few lines of YAML can make 10^9


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Section)


def read_settings(kind: type[Settings], path: str | Path, changes: Sequence[str] = ()) -> Settings:
    """The settings in the YAML file ``path``, with ``changes`` ("optimization.lr=1e-3") applied in their order.

    Raises ``ConfigError`` that names the file, the setting, what was expected and what came.
    """
    path = Path(path)
    try:
        text = path.read_bytes()[: MAX_CONFIG_BYTES + 1]
    except OSError as error:
        raise ConfigError(f"configuration {shown_path(path)} cannot be read: {error.strerror}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"configuration {shown_path(path)} is larger than {MAX_CONFIG_BYTES} bytes")
    try:
        tree = _load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"configuration {shown_path(path)} is no YAML: {shown(reason)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration {shown_path(path)} holds a {type(tree).__name__}, expected settings")
    return changed_settings(kind, tree, changes, shown_path(path))


def changed_settings(
    kind: type[Settings], tree: Mapping[str, Any], changes: Sequence[str], name: str = "configuration"
) -> Settings:
    """Settings as a mapping, which stays as it is, with ``changes`` applied in their order. Raises ``ConfigError``."""
    changed = deepcopy(dict(tree))
    for change in changes:
        _replace(changed, change)
    return parse_settings(kind, changed, name)


def parse_settings(kind: type[Settings], tree: Mapping[str, Any], name: str = "configuration") -> Settings:
    """Settings as a mapping, checked. Raises ``ConfigError``."""
    try:
        return kind(**tree)
    except ValidationError as error:
        raise ConfigError(_fault(kind, error, name)) from error
    except TypeError as error:  # a key that is no text
        raise ConfigError(f"{name}: {error}") from error


def settings_schema(kind: type[Section]) -> dict[str, Any]:
    """JSON Schema (2020-12) of the whole tree."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


_VALIDATED_KIND = re.compile(r"function-(?:after|before|wrap|plain)\[.*\]")  # as pydantic calls a kind with a check


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``1e-3`` for text, and of a key that is given twice the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _load(text: bytes | str) -> Any:
    """What YAML says. Raises ``YAMLError`` and ``ValueError`` (a date that is none, an endless tree)."""
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    found, places = 0, [tree]
    while places:
        place = places.pop()
        found += 1
        if found > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES} values, references spelled out")
        if isinstance(place, (dict, list)):
            places += place.values() if isinstance(place, dict) else place
    return tree


def _replace(tree: dict[str, Any], change: str) -> None:
    """Applies one ``a.b=value``; the value is read as YAML."""
    path, equals, text = change.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"{change!r}: expected a.b=value", hint="for example optimization.lr=1e-3")
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{change!r}: {shown(text)} is no YAML value") from error
    place = tree
    for key in keys[:-1]:
        inner = place.get(key)
        if inner is None:
            inner = place[key] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{change!r}: {key} holds {shown(inner)}, expected settings")
        place = inner
    place[keys[-1]] = value


def _fault(root: type[BaseModel], error: ValidationError, name: str) -> str:
    """One complaint in one line: a name that is unknown, with the nearest one, or else a value that cannot be.

    Of the kinds that a setting may have, the one that fits furthest is meant.
    """
    first = max(error.errors(), key=_fitness)
    alternatives = {"str", *_names(root)}  # pydantic puts the kind that it tried into the place
    path = [str(part) for part in first["loc"] if part not in alternatives]
    where = ".".join(part for part in path if not _VALIDATED_KIND.fullmatch(part))
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), _known(root, first["loc"][:-1]), n=1)
        return f"{name}: {where}: there is no such setting" + (f", the nearest is {near[0]!r}" if near else "")
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("value_error", "missing") else f", got {shown(first['input'])}"
    return f"{name}: {where + ': ' if where else ''}{message}{got}"


def _fitness(fault: ErrorDetails) -> tuple[bool, int, bool]:
    """How far a value fitted before ``fault``: a section's own check comes when all of its settings did."""
    return fault["type"] == "extra_forbidden", len(fault["loc"]), fault["type"] == "value_error"


def _known(root: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The settings of the section at ``path``."""
    sections = [root]
    for key in path:
        fields = [field for section in sections if (field := section.model_fields.get(str(key))) is not None]
        # What is no field's name is the kind that pydantic tried, or a key or place in the field before.
        sections = [inner for field in fields for inner in _sections(field.annotation)] or sections
    return [name for section in sections for name in section.model_fields]


def _names(section: type[BaseModel]) -> Iterator[str]:
    """Of every section at or below ``section``."""
    yield section.__name__
    for field in section.model_fields.values():
        for inner in _sections(field.annotation):
            yield from _names(inner)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Of a setting's kinds, or of what it holds many of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for kind in get_args(annotation):
        yield from _sections(kind)
