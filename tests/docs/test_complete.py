"""Everything that a person can meet is documented: settings, errors, calls, commands, documents, events, files."""

import importlib
import re
from dataclasses import fields

import pytest

from coordinator.settings import describe_settings
from docs.command_reference import walk
from docs.protocol_tables import SIGNERS, limit_reasons
from protocol import layout
from protocol.documents import DOCUMENTS
from protocol.errors import all_errors
from protocol.service import CALLS
from protocol.verdicts import VerdictCode
from tests.docs.pages import DOCS, ROOT, inline_code
from worker.audit_progress import AUDIT_EVENTS
from worker.progress import EVENTS

PAGES_OF = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("protocol", "operating", "volunteering")}
PACKAGES = ("protocol", "mmdit", "diloco", "verify", "worker", "coordinator", "commonweight", "docs", "benchmarks")
NOT_PYTHON = {"commonweight.json", "commonweight.v1", "commonweight.v1.Coordinator"}


def test_every_setting_is_documented_with_its_sentence() -> None:
    for setting in describe_settings():
        assert f"| `{setting.name}` |" in PAGES_OF["operating"]
        assert setting.sentence.rstrip(".") in PAGES_OF["operating"]


def test_every_error_code_is_documented() -> None:
    for kind in all_errors():
        assert f"| `{kind.code}` |" in PAGES_OF["protocol"]


def test_every_limit_is_documented_and_has_a_reason() -> None:
    for name, reason in limit_reasons().items():
        assert f"| `{name}` |" in PAGES_OF["protocol"]
        assert reason or name == "SKETCH_BYTES", f"{name} has no reason in protocol/limits.py"


def test_every_call_is_documented() -> None:
    for name in CALLS:
        assert f"| `{name}` |" in PAGES_OF["protocol"]


def test_every_signed_document_is_documented_with_its_type_and_signer() -> None:
    assert set(SIGNERS) == set(DOCUMENTS)
    for kind in DOCUMENTS:
        assert f"\n#### {kind.__name__}\n" in PAGES_OF["protocol"]
        assert f"`{kind.TYPE}`" in PAGES_OF["protocol"]


def test_every_worker_event_is_documented_with_its_fields() -> None:
    for event in EVENTS:
        row = re.search(rf"^\| `{event.NAME}` \| (.*?) \|", PAGES_OF["volunteering"], re.MULTILINE)
        assert row is not None, event.NAME
        assert row[1] == ", ".join(f"`{field.name}`" for field in fields(event))


def test_every_event_of_an_auditor_is_documented_with_its_fields() -> None:
    for event in AUDIT_EVENTS:
        row = re.search(rf"^\| `{event.NAME}` \| (.*?) \|", PAGES_OF["operating"], re.MULTILINE)
        assert row is not None, event.NAME
        assert row[1] == ", ".join(f"`{field.name}`" for field in fields(event))


@pytest.mark.parametrize(("name", "command"), sorted(walk()), ids=lambda part: part if isinstance(part, str) else "")
def test_every_command_and_each_of_its_options_is_documented(name: str, command: object) -> None:
    section = re.search(rf"^#### `{name}`\n(.*?)(?=^#|\Z)", DOCS, re.MULTILINE | re.DOTALL)
    assert section is not None
    for parameter in command.params:  # type: ignore[attr-defined]
        said = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[-1]
        assert said in section[1]
        assert parameter.help, f"{name}: {said} has no help"


def test_every_verdict_code_is_documented() -> None:
    source = (ROOT / "protocol" / "verdicts.py").read_text()
    outcomes = dict(re.findall(r"^    ([A-Z_]+) = .*# (accepted|rejected)", source, re.MULTILINE))
    assert outcomes.keys() == {code.value for code in VerdictCode}
    for code, outcome in outcomes.items():
        assert f"| `{code}` | {outcome} | " in PAGES_OF["protocol"]


def test_every_kind_of_log_entry_is_documented() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "coordinator").glob("*.py")))
    kinds = set(re.findall(r"""desk\.log\(\s*"([a-z-]+)\"""", source))
    assert len(kinds) >= 7
    for kind in kinds:
        assert f"| `{kind}` | " in PAGES_OF["protocol"]


def test_every_kind_of_public_file_is_documented() -> None:
    checkpoint = layout.checkpoint_directory(12)
    paths = [layout.RUN_CONFIG, layout.ROOT_KEY, layout.DELEGATION, layout.LATEST, layout.CALIBRATION]
    paths += [f"{checkpoint}/{path}" for path in (layout.MANIFEST, layout.PATCH, *layout.STATE)]
    paths += [layout.shard_path("SHA256"), layout.delta_path("SHA256"), layout.log_path(12), layout.metrics_path(12)]
    for path in paths:
        assert f"| `{path}` | " in PAGES_OF["protocol"]


def test_every_name_of_code_that_the_documentation_mentions_exists() -> None:
    names = {code for code in inline_code() if re.fullmatch(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+", code)} - NOT_PYTHON
    assert len(names) > 30
    for name in sorted(names):
        _resolve(name)


def _resolve(name: str) -> object:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"there is no {name}")


def test_every_source_file_that_the_documentation_mentions_exists() -> None:
    paths = {code for code in inline_code() if re.fullmatch(rf"(?:{'|'.join((*PACKAGES, 'tests'))})/[\w./]*", code)}
    paths = {path for path in paths if not path.endswith("/v1")}  # names that go into hashes
    assert len(paths) > 5
    for path in sorted(paths):
        assert (ROOT / path).exists(), path
