import re
import subprocess
import sys

import grpc
import pytest

from protocol import errors
from protocol.errors import ERRORS_BY_CODE, Bug, CommonweightError, LocalProblem, Refusal, TryLater

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CommonweightError)
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_code_of_its_own(kind: type[CommonweightError]) -> None:
    assert "code" in vars(kind), "an inherited code would name another error"
    assert re.fullmatch(r"[A-Z][A-Z_]{2,40}", kind.code)
    assert ERRORS_BY_CODE[kind.code] is kind
    assert [other for other in KINDS if other.code == kind.code] == [kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_a_sentence_that_a_person_can_read(kind: type[CommonweightError]) -> None:
    sentence = str(kind())
    assert vars(kind).get("__doc__"), "an inherited sentence would be about another error"
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_maps_to_a_grpc_status_and_an_exit_code(kind: type[CommonweightError]) -> None:
    assert grpc.StatusCode[kind.status] is not grpc.StatusCode.OK
    assert kind.exit_code in {1, 2}
    assert kind.exit_code == 1 or issubclass(kind, LocalProblem)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_in_exactly_one_branch_of_the_tree(kind: type[CommonweightError]) -> None:
    branches = [branch for branch in (Refusal, TryLater, LocalProblem, Bug) if issubclass(kind, branch)]
    assert len(branches) == (0 if kind is CommonweightError else 1)


def test_a_message_replaces_the_sentence_and_the_private_part_is_not_shown() -> None:
    error = errors.LeaseUnknown("No lease 1e.", private="asked by 10.0.0.1")
    assert str(error) == error.message == "No lease 1e."
    assert error.private == "asked by 10.0.0.1"
    assert "10.0.0.1" not in repr(error)


def test_what_can_be_tried_again_says_when() -> None:
    assert errors.ServerBusy().retry_after_ms == 5_000
    assert errors.ServerBusy(retry_after_ms=70).retry_after_ms == 70


def test_no_package_has_errors_of_its_own_that_no_page_would_list() -> None:
    found = (
        "import importlib, pkgutil\n"
        "from protocol import errors\n"
        "for name in ('commonweight', 'coordinator', 'worker', 'verify', 'diloco', 'mmdit'):\n"
        "    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + '.'):\n"
        "        if not module.name.endswith('__main__'):\n"
        "            importlib.import_module(module.name)\n"
        "print([kind.__name__ for kind in errors.all_errors() if kind.__module__ != 'protocol.errors'])\n"
    )
    done = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
