"""YAML into checked, documented sections: no unknown keys, a docstring under each field as its help text."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import RecipeError, first_line


class Section(BaseModel):
    """Part of a recipe: no unknown keys, a docstring under each field as its help text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)
    renamed: ClassVar[dict[str, str]] = {}
    """New names of fields by their old ones, which are refused."""


S = TypeVar("S", bound=Section)
_MOST_VALUES = 100_000
_DEEPEST = 100


class _Loader(yaml.SafeLoader):
    """Reads +256 as the text "+256", an addition, where YAML's integers would lose the sign.

    A key that is written twice is refused, where YAML would forget the first.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(problem=f"{twice!r} is written twice", problem_mark=node.start_mark)
        return node

    def fetch_more_tokens(self) -> None:
        if self.flow_level + len(self.indents) > _DEEPEST:  # the time that it takes grows with the square of it
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        super().fetch_more_tokens()

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES:,} values; write them out")
        return node


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values below a node and itself, those of an alias as often as it is used."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # for a node within itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = (part for item in inner for part in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {c: r for c, r in yaml.SafeLoader.yaml_implicit_resolvers.items() if c != "+"}


def read_sections(kind: type[S], path: str | Path) -> S:
    """Read a YAML file whose keys are the fields of `kind`.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (names the nearest), a missing or impossible value.
    """
    return parse_sections(kind, read_yaml(kind, path), where=str(path))


def read_yaml(kind: type[Section], path: str | Path) -> dict[str, Any]:
    """Read a YAML file of keys, such as the fields of `kind`.

    Raises:
        RecipeError: no such file, or not YAML.
    """
    try:
        content = load_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"cannot read recipe {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise RecipeError(f"recipe {path} holds {found}, not keys such as {_keys(kind)}")
    return content


def load_yaml(path: str | Path) -> Any:
    """Read a YAML file of plain values.

    Raises:
        OSError, UnicodeDecodeError: no such file, or not UTF-8 text.
        yaml.YAMLError: not YAML, or values that it does not have.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of dates and numbers that are none, and of nesting without end
        raise yaml.YAMLError(first_line(error)) from error


def parse_sections(kind: type[S], content: dict[str, Any], *, where: str) -> S:
    """Check nested dictionaries whose keys are the fields of `kind`; errors as in `read_sections`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [_describe(kind, problem) for problem in error.errors()]
        raise RecipeError("\n".join([f"{where}:", *(f"  {p}" for p in problems)])) from error


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, meaning) of every field, sections first: what `recipe --explain` prints."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield f"{prefix}{name}", "section", "", field.description or ""
            yield from fields(inner, f"{prefix}{name}{_places(field.annotation)}.")
            continue
        default = "required" if field.is_required() else "" if field.default is None else str(field.default)
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""


def _describe(kind: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section: type[BaseModel] | None = kind
        for part in problem["loc"][:-1]:
            if section is not None and isinstance(part, str) and part in section.model_fields:
                section = _section(section.model_fields[part].annotation)
        known, name = list((section or kind).model_fields), str(problem["loc"][-1])
        if new := getattr(section or kind, "renamed", {}).get(name):
            return f"unknown key {key!r}; it is called {new!r} now"
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key and not message.startswith("stages.") else message
    return f"{key} is {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next((a for a in typing.get_args(annotation) if a is not type(None)), None)
    if typing.get_origin(annotation) in (list, dict):
        annotation = typing.get_args(annotation)[-1]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _places(annotation: Any) -> str:
    """Write where in a list or by which name a section stands."""
    return {list: "[]", dict: ".NAME"}.get(typing.get_origin(annotation), "")


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(a) for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Literal:
        return " or ".join(str(a) for a in typing.get_args(annotation))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(
        annotation, str(annotation).replace("typing.", "").replace("str", "text").replace("float", "number")
    )
