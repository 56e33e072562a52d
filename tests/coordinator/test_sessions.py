"""Sessions: who gets a token, what a proof must name, and that an auditor's session is one of its own kind."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.sessions import Session, Sessions
from protocol.documents import DeviceDelegation, Digest, SessionProof, sign
from protocol.errors import (
    DelegationInvalid,
    DocumentRefused,
    NonceUnknown,
    NumericsMismatch,
    SessionRequired,
    SignatureInvalid,
    TermsNotAccepted,
    WrongRun,
)
from protocol.keys import PrivateKey
from protocol.limits import CLOCK_SKEW_MS, NONCE_MS, SESSION_MS
from tests.protocol.examples import (
    AUDITOR,
    AUDITOR_DELEGATION,
    CERTIFICATE,
    CONFIG,
    COORDINATOR,
    DELEGATION,
    DEVICE,
    LATER_MS,
    LEASE,
    NOW_MS,
    OWNER,
    ROOT,
    RUN,
    STRANGER,
)

DEVICES = DeviceDelegation(owner_public_key=OWNER.public.hex, device_public_key=DEVICE.public.hex)


class Door:
    """The sessions of a server whose wall clock says `wall_ms`, and somebody who wants one."""

    def __init__(self, *, wall_ms: int = NOW_MS) -> None:
        self.sessions = Sessions(
            run=RUN,
            root=ROOT.public,
            wall_ms=lambda: wall_ms,
            config=CONFIG,
            certificate_sha256=Digest(CERTIFICATE),
            upgrade_hint="Take a newer one.",
        )

    def knock(
        self, key: PrivateKey = DEVICE, delegation: bytes | None = None, *, now_ms: int = 0, **changed: Any
    ) -> Session:
        nonce = self.sessions.nonce(0)
        proof = SessionProof(
            run=RUN,
            certificate_sha256=CERTIFICATE,
            nonce=nonce.hex(),
            numerics=CONFIG.numerics,
            trainer_version="0.2.0",
            device_class="cpu-x86_64-avx2-torch2.13-t1",
            terms_sha256=CONFIG.terms_sha256,
        )
        envelope = sign(replace(proof, **changed), key)
        return self.sessions.prove(envelope, delegation or sign(DEVICES, OWNER), now_ms)

    def knock_as_auditor(self, key: PrivateKey = AUDITOR, **changed: Any) -> Session:
        return self.knock(key, sign(AUDITOR_DELEGATION, ROOT), **changed)


def test_a_device_gets_a_session_in_its_owners_name() -> None:
    door = Door()
    session = door.knock()
    assert (session.device_key, session.owner_key, session.auditor) == (DEVICE.public, OWNER.public, False)
    token = door.sessions.open(session)
    assert door.sessions.session(token, SESSION_MS - 1) == session
    assert door.sessions.devices(0) == 1
    for wrong, now_ms in ((None, 0), (b"guessed", 0), (token, SESSION_MS)):
        with pytest.raises(SessionRequired):
            door.sessions.session(wrong, now_ms)


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"run": "ab" * 32}, WrongRun),
        ({"certificate_sha256": "ab" * 32}, DelegationInvalid),
        ({"nonce": "ab" * 32}, NonceUnknown),
        ({"numerics": 99}, NumericsMismatch),
        ({"terms_sha256": "ab" * 32}, TermsNotAccepted),
    ],
)
def test_a_proof_must_name_this_run_this_server_this_moment_and_what_it_accepts(
    changed: dict[str, Any], refusal: type[Exception]
) -> None:
    with pytest.raises(refusal):
        Door().knock(**changed)


def test_a_nonce_is_good_once_and_for_a_minute() -> None:
    door = Door()
    nonce = door.sessions.nonce(0).hex()
    door.knock(nonce=nonce)
    with pytest.raises(NonceUnknown):
        door.knock(nonce=nonce)
    with pytest.raises(NonceUnknown):
        door.knock(now_ms=NONCE_MS)


def test_a_device_that_its_owner_did_not_delegate_is_refused() -> None:
    door = Door()
    with pytest.raises(SignatureInvalid):
        door.knock(delegation=sign(DEVICES, STRANGER))
    with pytest.raises(SignatureInvalid):
        door.knock(STRANGER)
    same = DeviceDelegation(owner_public_key=OWNER.public.hex, device_public_key=OWNER.public.hex)
    with pytest.raises(DelegationInvalid, match="device key as well"):
        door.knock(OWNER, sign(same, OWNER))
    with pytest.raises(DocumentRefused):
        door.knock(delegation=sign(LEASE, COORDINATOR))


# --- auditors ------------------------------------------------------------------------------------------------


def test_an_auditor_is_its_own_device_and_its_own_owner() -> None:
    session = Door().knock_as_auditor()
    assert session.auditor
    assert (session.device, session.owner) == (AUDITOR.public.key_id, AUDITOR.public.key_id)
    assert (session.device_key, session.owner_key) == (AUDITOR.public, AUDITOR.public)


def test_an_auditor_accepts_no_terms_but_computes_as_the_run_does() -> None:
    assert Door().knock_as_auditor(terms_sha256="ab" * 32).auditor
    with pytest.raises(NumericsMismatch):
        Door().knock_as_auditor(numerics=99)


@pytest.mark.parametrize("signer", [AUDITOR, COORDINATOR, OWNER, STRANGER])
def test_nobody_but_the_root_makes_an_auditor(signer: PrivateKey) -> None:
    with pytest.raises(SignatureInvalid):
        Door().knock(AUDITOR, sign(AUDITOR_DELEGATION, signer))


def test_who_holds_another_key_than_the_delegated_one_is_no_auditor() -> None:
    for key in (STRANGER, DEVICE, COORDINATOR):
        with pytest.raises(SignatureInvalid):
            Door().knock_as_auditor(key)


def test_a_key_that_the_root_delegated_otherwise_opens_no_session() -> None:
    with pytest.raises(DelegationInvalid, match="not as auditor"):
        Door().knock(AUDITOR, sign(replace(AUDITOR_DELEGATION, role="release"), ROOT))
    with pytest.raises(DelegationInvalid, match="not as auditor"):
        Door().knock(COORDINATOR, sign(DELEGATION, ROOT))


def test_an_auditor_of_another_run_opens_no_session() -> None:
    with pytest.raises(WrongRun):
        Door().knock(AUDITOR, sign(replace(AUDITOR_DELEGATION, run="ab" * 32), ROOT))


def test_an_auditors_delegation_ends_by_the_wall_clock_not_by_the_servers_ticks() -> None:
    assert Door(wall_ms=LATER_MS + CLOCK_SKEW_MS).knock_as_auditor().auditor
    with pytest.raises(DelegationInvalid, match="expired"):
        Door(wall_ms=LATER_MS + CLOCK_SKEW_MS + 1).knock_as_auditor()
