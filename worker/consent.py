"""What a volunteer agrees to before anything is sent: the run's terms and the licence of the trained weights."""

import json
from collections.abc import Callable
from pathlib import Path

from protocol.canonical import canonical_json, parse_json
from protocol.documents import Digest, RunConfig
from protocol.errors import ConsentNeeded, PayloadInvalid
from protocol.printing import printable, printable_text
from worker.durable import disk_named, write_durably

Ask = Callable[[str], bool]
"""Shows a text to a person and returns whether it was accepted."""


def terms_text(config: RunConfig) -> str:
    """Return what a person is shown: only text, whatever the run's config holds."""
    name, licence = printable(config.name), printable(config.weights_licence)
    return (
        f'Terms of the run "{name}":\n\n{printable_text(config.terms.strip())}\n\n'
        f"The trained weights are published under: {licence}\n"
        f"They are trained on: {printable(config.data.name)} ({printable(config.data.licence)})"
    )


def ensure_consent(path: Path, config: RunConfig, *, accept_terms: bool, ask: Ask | None) -> None:
    """Return if these very terms were accepted before, by option, or now; remember it.

    Args:
        path: file of the run's consent.
        accept_terms: the person accepted with an option.
        ask: asks at a terminal; None if nobody is there.

    Raises:
        ConsentNeeded: nobody accepted.
    """
    if accepted_terms(path) == config.terms_sha256:
        return
    text = terms_text(config)
    if not accept_terms:
        if ask is None:
            raise ConsentNeeded(
                f"{text}\n\nStart the worker with --accept-terms, or at a terminal, to accept these terms."
            )
        if not ask(text):
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
