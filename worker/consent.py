"""What a volunteer agrees to before anything is sent: the run's terms and the licence of the trained weights."""

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Final

from protocol.canonical import canonical_json, parse_json
from protocol.documents import Digest, RunConfig
from protocol.errors import ConsentNeeded, PayloadInvalid
from protocol.printing import printable, printable_text
from verify.hearing import heard_by_trainers, networks_source
from worker.durable import disk_named, write_durably

Ask = Callable[[str], bool | None]
"""Shows a text to a person and returns whether it was accepted; None if nobody is there to answer."""

WIDEST_TEXT: Final = 100
"""Characters in a line of the terms, however wide the terminal is."""
_CHECKING: Final = {
    "none": "Nobody trains a unit again in this run to check its result.",
    "replay": "Some of your units are trained again by others to check them. If a result is found to be wrong, the key "
    "of its owner is excluded from this run; you can appeal.",
}
"""What a run's way of verifying means to a volunteer."""
_OWN_LINE: Final = re.compile(r"\s|[-*#>]|\d+[.)]\s")
"""How a line begins that is no continuation of the one before: indented, an item of a list, a heading."""


def terms_text(config: RunConfig) -> str:
    """Return what a person is shown: only text, whatever the run's config holds."""
    data = config.data
    name, licence = printable(config.name), printable(config.weights_licence)
    return (
        f'Terms of the run "{name}":\n\n{printable_text(config.terms.strip())}\n\n'
        f"- The trained weights are published under: {licence}\n"
        f"- They are trained on: {printable(data.name)} ({printable(data.licence)}), from {printable(data.source)}\n"
        f"- {_CHECKING[config.verification.mode]}{_hearing(config)}"
    )


def _hearing(config: RunConfig) -> str:
    """Return what a run asks of a machine besides training, as one more item; none for most runs."""
    heard = heard_by_trainers(config)
    if not heard:
        return ""
    networks = ", ".join(f"{encoder.name} ({encoder.tokens} tokens)" for encoder in heard)
    source = networks_source(config)
    where = f" (to be had from {source})" if source else ""
    return (
        f"\n- Your machine runs the run's text encoders besides: {networks}. It needs their networks{where}, which "
        "--components names, and the memory for them."
    )


def reflow(text: str, width: int) -> str:
    """Return a text with its paragraphs broken to a width; what stands on a line of its own stays there."""
    shown: list[str] = []
    joins = False
    for line in text.split("\n"):
        continues = joins and line.strip() and not _OWN_LINE.match(line)
        if continues:
            shown[-1] = f"{shown[-1].rstrip()} {line.strip()}"
        else:
            shown.append(line)
        joins = bool(line.strip()) and (bool(continues) or not line[0].isspace())
    return "\n".join(_wrapped(line, width) for line in shown)


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + (2 if re.match(r"\s*[-*]\s", line) else 0))
    return textwrap.fill(line, max(width, 20), subsequent_indent=indent[:10], break_on_hyphens=False)


def ensure_consent(path: Path, config: RunConfig, *, accept_terms: bool, ask: Ask | None) -> None:
    """Return if these very terms were accepted before, by option, or now; remember it.

    Args:
        path: file of the run's consent.
        accept_terms: the person accepted with an option.
        ask: shows the terms and asks for an answer; None if there is nobody to show them to.

    Raises:
        ConsentNeeded: nobody accepted.
    """
    if accepted_terms(path) == config.terms_sha256:
        return
    text = terms_text(config)
    if not accept_terms:
        answer = None if ask is None else ask(text)
        if answer is None:
            raise ConsentNeeded(
                "The run's terms must be accepted first: start the worker at a terminal, or with --accept-terms."
            )
        if not answer:
            raise ConsentNeeded("The run's terms were not accepted; nothing was sent.")
    with disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(path, canonical_json({"format": 1, "terms_sha256": config.terms_sha256}), mode=0o600)


def accepted_terms(path: Path) -> Digest | None:
    """Return the digest of the terms that were accepted before, if any."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, PayloadInvalid, json.JSONDecodeError):
        return None
    digest = value.get("terms_sha256") if isinstance(value, dict) else None
    return Digest(digest) if isinstance(digest, str) else None
