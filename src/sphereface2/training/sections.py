"""Settings as dataclasses: read from YAML and from the command line, checked by their types.

A text setting is the text that was given, whatever YAML would make of it: ``2024-05-01``, ``yes``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml
from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError

from sphereface2.errors import UserError, did_you_mean
from sphereface2.files import MOST_BYTES, read_yaml
from sphereface2.heads import Scaling

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Torch's numbers are float32, whose greatest is 3.4e38.
Positive = Annotated[float, Field(gt=0, le=1e38)]
NotNegative = Annotated[float, Field(ge=0, le=1e38)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
FalseAcceptRate = Annotated[float, Field(gt=0, le=1)]


def _without(*characters: str) -> AfterValidator:
    def check(text: str) -> str:
        if found := [one for one in characters if one in text]:
            raise ValueError(f"must not contain {found[0]!r}")
        return text

    return AfterValidator(check)


Text = Annotated[str, StringConstraints(min_length=1), _without("\0")]


def _short(name: str) -> str:
    if (length := len(os.fsencode(name))) > _MOST_NAME:
        raise ValueError(f"must be a name of at most {_MOST_NAME} bytes, not {length}")
    return name


_MOST_NAME = MOST_BYTES - len("-20260101-000000")
FolderName = Annotated[Text, _without("/", "\n"), AfterValidator(_short)]
"""The beginning of a folder's name, which a time follows."""
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path; ``~`` in it is the home folder."""


def recipes() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read(path: Path, what: str, section: type | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file has none.

    Args:
        path: the file.
        what: what messages call it.
        section: the dataclass that it is for, which tells text from other values.

    Raises:
        UserError: unreadable, no YAML, no mapping.
    """
    loaded = read_yaml(path, _Loader, f"the YAML file of a {what}")
    if not isinstance(loaded, dict | None):
        raise UserError(f"the {what} {path} must be a mapping of settings, such as 'seed: 1'")
    tree: dict[str, Any] = _typed(loaded or {}, section)
    return tree


def parse(arguments: Sequence[str], section: type) -> Iterator[tuple[str, Any]]:
    """Keys and values of ``--section.key value`` and ``--section.key=value`` words.

    Raises:
        UserError: a word that is none of these.
    """
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; settings are given as --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{key} needs a value")
            text = words.pop(0)
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError, ValueError):
            value = text  # what a text setting may be, and no other
        while isinstance(value, _Scalar):
            value = value.value
        key = key.replace("-", "_")
        yield key, _typed(_Scalar(text, value), _hint(section, key.split(".")))


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` of nested settings.

    Raises:
        UserError: a part of the way is a setting, not a section.
    """
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: {'.'.join(parents[: depth + 1])} is not a section")
    tree[leaf] = value


def override(tree: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Set many. A head of another name does not get what the tree has for its own loss.

    Example:
        >>> tree = {"head": {"name": "sphereface2", "lam": 0.7, "sharded": True}}
        >>> override(tree, {"head.name": "cosface", "head.m": 0.3})
        >>> tree
        {'head': {'sharded': True, 'name': 'cosface', 'm': 0.3}}
    """
    head, name = tree.get("head"), given.get("head.name")
    if name is not None and isinstance(head, dict) and head.get("name", name) != name:
        shared = {"sharded", *get_type_hints(Scaling)}
        tree["head"] = {key: head[key] for key in head if key in shared}
    for key, value in given.items():
        assign(tree, key, value)


@functools.cache
def _adapter(section: Any) -> TypeAdapter[Any]:
    return TypeAdapter(section)


def validated(
    section: type[T], tree: dict[str, Any], where: str, overridden: Iterable[str] = ()
) -> T:
    """The dataclass ``section`` made of nested plain values.

    Raises:
        UserError: the first thing that is wrong: the setting, what was expected, what was given
            and where.
    """
    for key, value in _booleans(tree, section):
        where = _origin(key, where, overridden)
        raise UserError(f"{key} must be a number, got {shown(value)} in {where}")
    try:
        settings: T = _adapter(section).validate_python(tree)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from error
        where = _origin(key, where, overridden)
        if first["type"] == "unexpected_keyword_argument":
            *parents, name = first["loc"]
            known = _fields(_hint(section, parents))
            raise UserError(
                f"unknown setting {key} in {where}{did_you_mean(name, known)}; "
                f"known: {', '.join(sorted(known))}"
            ) from error
        missing = first["type"] == "missing"  # where pydantic names what lies around it
        got = "" if missing else f", got {shown(first['input'])}"
        raise UserError(f"{key} {_expected(first)}{got} in {where}") from error
    return settings


def _booleans(value: Any, hint: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[str, bool]]:
    """Where true or false stands for a number, which pydantic would read as 1 or 0."""
    kinds = [*_alternatives(hint)]
    if isinstance(value, bool) and bool not in kinds and {int, float}.intersection(kinds):
        yield ".".join(way), value
    parts = value.items() if isinstance(value, dict) else ()
    for name, part in enumerate(value) if isinstance(value, list | tuple) else parts:
        inner = next((found for kind in kinds if (found := _hint(kind, [name]))), None)
        yield from _booleans(part, inner, (*way, str(name)))


def _origin(key: str, where: str, overridden: Iterable[str]) -> str:
    """Where a setting, or the list or section that holds it, was given."""
    above = any(key == one or key.startswith(f"{one}.") for one in overridden)
    return "the command line" if above else where


def _expected(error: Any) -> str:
    """What pydantic wants, as the end of a sentence about the setting."""
    kinds = {
        "missing": "must be given",
        "dataclass_type": "must be a section of settings",
        "dict_type": "must be a section of settings",
        "list_type": "must be a list, such as [1, 2]",
        "string_type": "must be text",
        "string_too_short": "must not be empty",
    }
    if error["type"] in kinds:
        return kinds[error["type"]]
    message: str = error["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return message[0].lower() + message[1:]


def shown(value: Any) -> str:
    """A setting's value in a message, as YAML writes it."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    except yaml.YAMLError:  # no value that YAML has
        text = repr(value)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else text[:59] + "…"


class _Scalar(NamedTuple):
    """A value and the text that it was read from, which is the value of a text setting."""

    text: str
    value: Any


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Keeps the text of values, and reads numbers as YAML 1.2 does.

    In PyYAML's 1.1 ``010`` is 8, ``1:30`` is 90, and ``5e-4`` is text.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep=deep)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str):
            return _Scalar(node.value, value)
        return value


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INT, _integer)
for _tag, _pattern in (
    (_INT, r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"),
    (_FLOAT, r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _typed(value: Any, hint: Any) -> Any:
    """Plain values for what `_Loader` gave: texts and lists where ``hint``, a type, wants them."""
    if isinstance(value, _Scalar):
        listed = any(get_origin(one) is list for one in _alternatives(hint))
        if listed and not isinstance(value.value, list | None):
            return _typed([value], hint)  # one thing where several may be
        wants_text = str in _alternatives(hint) and value.value is not None
        return value.text if wants_text else _typed(value.value, hint)
    if isinstance(value, dict):
        known = _fields(hint)
        keys = {key: key.text if isinstance(key, _Scalar) else key for key in value}
        return {name: _typed(value[key], known.get(name)) for key, name in keys.items()}
    if isinstance(value, list):
        element = next((get_args(one)[0] for one in _alternatives(hint) if get_args(one)), None)
        return [_typed(item, element) for item in value]
    return value


def _alternatives(hint: Any) -> Iterator[Any]:
    """The types that a hint allows; ``str`` too for a choice of texts."""
    if get_origin(hint) is Literal:
        yield type(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _fields(hint: Any) -> Mapping[str, Any]:
    """The settings of a section and their types; the name alone of a component's."""
    if dataclasses.is_dataclass(hint):
        return _hints(hint)  # type: ignore[arg-type]
    return {"name": str} if hint == dict[str, Any] else {}


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return get_type_hints(section)


def _hint(hint: Any, path: Sequence[Any]) -> Any:
    """The type of what lies at ``path`` within a section; None where nothing does."""
    for part in path:
        hint = _fields(hint).get(part) or next(iter(get_args(hint)[-1:]), None)
    return hint
