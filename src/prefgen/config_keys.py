"""The keys of a configuration dataclass (name, type, default, help), and text parsed by those types."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING

from prefgen.errors import ConfigError

MAX_YAML_BYTES = 1 << 20
"""Most bytes of a configuration file."""

Text = str | list["Text"]
"""A raw value: text, or a list of raw values; nothing has been guessed from its looks."""


@dataclass(frozen=True, kw_only=True)
class ConfigKey:
    """One key a user may set.

    Attributes:
        name: dotted, e.g. ``data.batch_size``.
        type: the declared type of the field.
        default: the dataclass's default; ``???`` when the key is required.
        help: the string under the field.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def type_name(self) -> str:
        """The type in words, e.g. ``int or null``, ``one of min, max``."""
        return _type_name(self.type)


def list_keys(config_type: type, *, prefix: str = "", defaults: object | None = None) -> list[ConfigKey]:
    """Every settable key of a configuration dataclass, nested sections included, in order of declaration.

    Args:
        config_type: the dataclass.
        prefix: of the keys' names.
        defaults: an instance to take defaults from: a stage may change those of a shared section.
    """
    hints, helps = get_type_hints(config_type), _help_texts(config_type)
    keys: list[ConfigKey] = []
    for item in fields(config_type):
        name, default = prefix + item.name, item.default
        if defaults is not None:
            default = getattr(defaults, item.name)
        elif item.default_factory is not NO_DEFAULT:
            default = item.default_factory()
        if is_dataclass(default):
            keys += list_keys(type(default), prefix=f"{name}.", defaults=default)
        else:
            default = MISSING if default is NO_DEFAULT else default
            helped = helps.get(item.name, "")
            keys.append(ConfigKey(name=name, type=hints[item.name], default=default, help=helped))
    return keys


@cache
def _help_texts(config_type: type) -> dict[str, str]:
    """The string literal under each field, base classes included."""
    helps: dict[str, str] = {}
    for owner in reversed(config_type.__mro__):
        if not is_dataclass(owner):
            continue
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for statement, after in zip(body, body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                helps[statement.target.id] = " ".join(str(after.value.value).split())
    return helps


def parse_text(text: Text, *, key: ConfigKey, source: str = "") -> Any:
    """Raw text as a value of the key's declared type; ``${..}`` is left for OmegaConf.

    Raises:
        ConfigError: the text is no value of that type, naming the key, the text and what is allowed.
    """
    try:
        return _parse(text, key.type)
    except _WrongChoiceError as error:
        raise ConfigError(f"{source}{key.name}: {text!r} is not one of {error}") from None
    except ValueError:
        raise ConfigError(f"{source}{key.name}: expected {key.type_name}, got {text!r}") from None


class _WrongChoiceError(ValueError):
    """A text that is none of a Literal's choices, which the message lists."""


def _parse(text: Text, kind: Any) -> Any:
    if isinstance(text, str) and "${" in text:
        return text
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType) and NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if text == "null" else _parse(text, inner)
    if origin in (list, tuple):
        return _parse_sequence(text, arguments)
    if not isinstance(text, str):
        raise ValueError
    if origin is Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise _WrongChoiceError(", ".join(map(str, arguments)))
    return _SCALARS[kind](text)


def _parse_sequence(text: Text, kinds: tuple[Any, ...]) -> list[Any]:
    items = _raw_yaml(text, where="value") if isinstance(text, str) else text
    if not isinstance(items, list):
        raise ValueError
    if len(kinds) == 1 or kinds[-1] is Ellipsis:
        return [_parse(item, kinds[0]) for item in items]
    if len(kinds) != len(items):
        raise ValueError
    return [_parse(item, kind) for item, kind in zip(items, kinds, strict=True)]


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", text):
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _truth(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise ValueError from None


_SCALARS: dict[Any, Callable[[str], Any]] = {int: _integer, float: _number, bool: _truth, str: str}


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join("null" if a is NoneType else _type_name(a) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        if len(arguments) == 1 or arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}"
        return f"[{', '.join(_type_name(a) for a in arguments)}]"
    return "true or false" if kind is bool else str(kind.__name__)


def did_you_mean(word: str, *, among: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest allowed word, or an empty text when none is near."""
    near = difflib.get_close_matches(word, list(among), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


class _RawLoader(yaml.BaseLoader):
    """YAML whose scalars all stay text; a key that comes twice is refused, and so is an alias."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Aliases let a few lines stand for billions."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", mark)
        return super().compose_node(parent, index)


def _mapping(loader: _RawLoader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        wrong = "keys must be plain text" if not isinstance(key, str) else f"{key} is given twice"
        if not isinstance(key, str) or key in pairs:
            raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
        pairs[key] = loader.construct_object(value_node, deep=True)
    return pairs


_RawLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _raw_yaml(text: str, *, where: str) -> Any:
    try:
        # BaseLoader builds text, lists and dicts only: nothing in a file can run code.
        return yaml.load(text, Loader=_RawLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None


def read_yaml(file: Path) -> list[tuple[str, Text]]:
    """The leaves of a configuration file as (dotted key, raw text or list).

    Raises:
        ConfigError: the file cannot be read, is not YAML, is no mapping, or gives a key twice.
    """
    try:
        if file.exists() and not file.is_file():
            raise ConfigError(f"configuration file {file} is no regular file")
        if file.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"configuration file {file} has over {MAX_YAML_BYTES:,} bytes")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read configuration file {file}: {error}") from None
    return read_yaml_text(text, where=str(file))


def read_yaml_text(text: str, *, where: str) -> list[tuple[str, Text]]:
    """``read_yaml`` for text at hand."""
    content = _raw_yaml(text, where=where)
    if content in (None, ""):
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected 'key: value' lines, got {type(content).__name__}")
    return list(_leaves(content))


def _leaves(tree: dict[str, Any], *, prefix: str = "") -> Iterator[tuple[str, Text]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, value
