"""JSON content as values of annotated dataclasses, or a message that says what does not fit."""

import dataclasses
from enum import EnumType
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lipcert.errors import LipcertError


def typed(kind: Any, value: Any, where: str) -> Any:
    """JSON content as a value of a type.

    Args:
        kind: A dataclass, an enum, float, int, str, `tuple[kind, ...]`, `dict[str, kind]` or
            `kind | None`, nested as wanted. Fields that a dataclass does not have are left out.
        value: The content.
        where: The place of the content, for the message.

    Raises:
        LipcertError: It does not fit. The message is the beginning of a sentence, without its end.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict):
            raise LipcertError(f"{where} is {value!r:.40}, not an object")
        optional = {
            field.name
            for field in dataclasses.fields(kind)
            if field.default_factory is not dataclasses.MISSING
            or field.default is not dataclasses.MISSING
        }
        missing = [name for name in hints if name not in value and name not in optional]
        if missing:
            raise LipcertError(f"{where} has no {missing[0]!r}")
        given = {name: hint for name, hint in hints.items() if name in value}
        return kind(**{name: typed(hint, value[name], name) for name, hint in given.items()})
    parts = get_args(kind)
    match get_origin(kind):
        case origin if origin is UnionType:
            return None if value is None else typed(parts[0], value, where)
        case origin if origin is tuple and isinstance(value, list):
            return tuple(typed(parts[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        case origin if origin is dict and isinstance(value, dict):
            return {k: typed(parts[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(kind, EnumType) and value in list(kind):
        return kind(value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise LipcertError(f"{where} is {value!r:.40}, not {getattr(kind, '__name__', kind)}")
