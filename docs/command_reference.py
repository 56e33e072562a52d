"""The commands, from their own definitions: plain text of a fixed width, the same in every terminal."""

import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, get_args, get_origin

import typer.main

from commonweight.cli.main import app
from docs.markdown import fenced

WIDTH: Final = 100
_INDENT: Final = 26
_KINDS: Final[dict[object, str]] = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}

Command = Any
"""A command as typer builds it; its parser's classes have no stable home to import them from."""


def walk(command: Command | None = None, path: tuple[str, ...] = ("commonweight",)) -> Iterator[tuple[str, Command]]:
    """Yield every command that does something, with its full name ("commonweight worker start")."""
    here = typer.main.get_command(app) if command is None else command
    below: dict[str, Command] = getattr(here, "commands", {})
    if not below:
        yield " ".join(path), here
    for name, child in below.items():
        yield from walk(child, (*path, name))


def commands() -> str:
    """Return the help of every command."""
    parts = [f"\n#### `{name}`\n{fenced('text', _help(name, command))}" for name, command in sorted(walk())]
    return "".join(parts)


def _help(name: str, command: Command) -> str:
    lines = [*_usage(name, command), ""]
    for paragraph in (command.help or "").split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), WIDTH), ""]
    for parameter in command.params:
        lines += _parameter(parameter)
    return "\n".join(lines)


def _usage(name: str, command: Command) -> list[str]:
    words = [parameter.metavar or parameter.name.upper() for parameter in command.params if _is_argument(parameter)]
    words += [
        f"{parameter.opts[-1]} {_metavar(parameter)}".strip()
        for parameter in command.params
        if not _is_argument(parameter) and parameter.required
    ]
    options = any(not _is_argument(parameter) and not parameter.required for parameter in command.params)
    return textwrap.wrap(" ".join([name, *words, *(["[OPTIONS]"] if options else [])]), WIDTH, subsequent_indent="    ")


def _parameter(parameter: Command) -> list[str]:
    said = " ".join((parameter.help or "").split())
    if _is_argument(parameter):
        title = parameter.metavar or parameter.name.upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        title = f"{names} {_metavar(parameter)}".rstrip()
        said += _default(parameter)
    body = textwrap.wrap(said, WIDTH - _INDENT)
    if len(title) + 4 > _INDENT:
        return [f"  {title}", *(" " * _INDENT + line for line in body)]
    return [f"  {title:<{_INDENT - 2}}{body[0]}", *(" " * _INDENT + line for line in body[1:])]


def _metavar(parameter: Command) -> str:
    if parameter.is_flag:
        return ""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if get_origin(kind) is list:  # it may be given several times
        (kind,) = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(choice.value for choice in kind)
    return _KINDS[kind]


def _default(parameter: Command) -> str:
    if parameter.required:
        return " [required]"
    # Flags are off, and an option without a default says itself what happens then.
    if parameter.default is None or parameter.is_flag or parameter.multiple:
        return ""
    return f" [default: {getattr(parameter.default, 'value', parameter.default)}]"


def _is_argument(parameter: Command) -> bool:
    return bool(parameter.param_type_name == "argument")
