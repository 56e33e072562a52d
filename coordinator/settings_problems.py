"""What is wrong with a setting, in a sentence: its name, its value, and what would be right."""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_MOST_SHOWN: Final = 60
_KINDS: Final[dict[object, str]] = {int: "a whole number", float: "a number", str: "a text in quotes"}


def show(value: object) -> str:
    """Return a value as run.toml writes it, cut to a length that a sentence bears."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        text = "(nested too deeply to show)"
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def rule_of(field: FieldInfo) -> str:
    """Return what a setting may be: "a whole number from 1 to 100,000"."""
    choices = _choices(field.annotation)
    if choices:
        return " or ".join(show(choice) for choice in choices)
    kind = next(_KINDS[part] for part in (field.annotation, *get_args(field.annotation)) if part in _KINDS)
    low = next((bound for part in field.metadata if (bound := _low(part)) is not None), None)
    high = next((bound for part in field.metadata if (bound := _high(part)) is not None), None)
    bounds = {("from", "to"): "from {} to {}", ("of", "to"): "of {} to {} characters"}
    if low and high and (low[0], high[0]) in bounds:
        return f"{kind} {bounds[low[0], high[0]].format(low[1], high[1])}"
    limits = [
        f"at least {bound}" if word == "from" else f"at most {bound}" if word == "to" else f"{word} {bound}"
        for word, bound in filter(None, (low, high))
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def known_settings(root: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of every setting of a settings class made of sections."""
    for section, outer in root.model_fields.items():
        assert isinstance(outer.annotation, type)
        assert issubclass(outer.annotation, BaseModel)
        for key, field in outer.annotation.model_fields.items():
            yield f"{section}.{key}", field


def sentences(error: ValidationError, root: type[BaseModel]) -> Sequence[str]:
    """Return a sentence for each problem that pydantic found in settings of class `root`."""
    fields = dict(known_settings(root))
    return [_sentence(problem, fields, root) for problem in error.errors(include_url=False)]


def _sentence(problem: ErrorDetails, fields: dict[str, FieldInfo], root: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "value_error":
        # Our own checks say the whole sentence.
        return str(problem["ctx"]["error"])
    if problem["type"] == "extra_forbidden":
        return _unknown(name, fields, root)
    if name in root.model_fields:
        return f"{name} is {show(value)}; it must be a section, written [{name}] on a line of its own."
    return f"{name} is {show(value)}; it must be {rule_of(fields[name])}."


def _unknown(name: str, fields: dict[str, FieldInfo], root: type[BaseModel]) -> str:
    what, known = ("setting", list(fields)) if "." in name else ("section", list(root.model_fields))
    by_key = [candidate for candidate in known if candidate.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = by_key or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if nearest:
        return f"{name} is no {what}; did you mean {nearest[0]}?"
    siblings = [candidate for candidate in known if candidate.partition(".")[0] == name.partition(".")[0]]
    return f"{name} is no {what}; there are {', '.join(siblings or known)}."


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(choice for part in get_args(annotation) for choice in _choices(part))
    return ()


def _low(part: object) -> tuple[str, str] | None:
    match part:
        case annotated_types.Ge(ge=bound):
            return "from", f"{bound:,}"
        case annotated_types.Gt(gt=bound):
            return "above", f"{bound:,}"
        case annotated_types.MinLen(min_length=length):
            return "of", f"{length:,}"
        case _:
            return None


def _high(part: object) -> tuple[str, str] | None:
    match part:
        case annotated_types.Le(le=bound):
            return "to", f"{bound:,}"
        case annotated_types.Lt(lt=bound):
            return "below", f"{bound:,}"
        case annotated_types.MaxLen(max_length=length):
            return "to", f"{length:,}"
        case _:
            return None
