"""Every code of a verdict: one that a verdict can carry, and that no error has already."""

from dataclasses import replace

import pytest

from protocol.documents import Verdict, parse_payload, payload_of
from protocol.errors import ERRORS_BY_CODE
from protocol.verdicts import VerdictCode
from tests.protocol.examples import VERDICT


@pytest.mark.parametrize("code", VerdictCode)
def test_a_verdict_can_carry_every_code(code: VerdictCode) -> None:
    verdict = replace(VERDICT, code=code.value)
    assert parse_payload(Verdict, payload_of(verdict)) == verdict


def test_a_code_that_is_an_errors_too_means_the_same() -> None:
    # A verdict on bytes that were refused carries the refusal's own code, so the two lists share one name space.
    shared = {code.value for code in VerdictCode} & ERRORS_BY_CODE.keys()
    assert shared == {"OWNER_BANNED"}
