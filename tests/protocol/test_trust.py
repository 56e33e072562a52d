"""Every step of `RunTrust`, and the attack that the step stops."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from protocol.documents import Document, RunId, digest_of, sign
from protocol.errors import (
    DelegationInvalid,
    EndpointUntrusted,
    EnvelopeInvalid,
    FormatUnknown,
    PayloadInvalid,
    SignatureInvalid,
    WrongRun,
)
from protocol.keys import PrivateKey
from protocol.limits import CLOCK_SKEW_MS, MAX_ENVELOPE_BYTES
from protocol.trust import RunTrust
from tests.protocol.examples import (
    AUDITOR,
    AUDITOR_DELEGATION,
    BYTES_RECEIPT,
    CERTIFICATE,
    CLAIM_RECEIPT,
    CONFIG,
    CONFIG_SHA256,
    COORDINATOR,
    DELEGATION,
    DEVICE,
    ENDPOINT,
    LATER_MS,
    LEASE,
    MANIFEST,
    NOW_MS,
    ROOT,
    RUN,
    STRANGER,
    VERDICT,
)

OTHER_RUN = RunId(STRANGER.public.key_id)


def _after_root() -> RunTrust:
    trust = RunTrust(RUN)
    trust.admit_root(ROOT.public.raw)
    return trust


def _after_delegation() -> RunTrust:
    trust = _after_root()
    trust.admit_delegation(sign(DELEGATION, ROOT), now_ms=NOW_MS)
    return trust


def _after_config() -> RunTrust:
    trust = _after_delegation()
    trust.admit_config(sign(CONFIG, ROOT))
    return trust


def test_an_honest_run_is_believed_step_by_step() -> None:
    trust = _after_config()
    assert trust.admit_endpoint(sign(ENDPOINT, COORDINATOR), certificate_sha256=CERTIFICATE, now_ms=NOW_MS) == ENDPOINT
    assert (trust.root, trust.coordinator) == (ROOT.public, COORDINATOR.public)
    assert (trust.config, trust.config_sha256) == (CONFIG, CONFIG_SHA256)
    assert trust.lease(sign(LEASE, COORDINATOR)) == LEASE
    assert trust.claim_receipt(sign(CLAIM_RECEIPT, COORDINATOR)) == CLAIM_RECEIPT
    assert trust.bytes_receipt(sign(BYTES_RECEIPT, COORDINATOR)) == BYTES_RECEIPT
    assert trust.verdict(sign(VERDICT, COORDINATOR)) == VERDICT
    assert trust.manifest(sign(MANIFEST, COORDINATOR)) == MANIFEST


def test_steps_cannot_be_taken_out_of_order() -> None:
    fresh, rooted = RunTrust(RUN), _after_root()
    delegated = _after_delegation()
    too_early: list[Callable[[], object]] = [
        lambda: fresh.root,
        lambda: fresh.admit_delegation(sign(DELEGATION, ROOT), now_ms=NOW_MS),
        lambda: fresh.admit_auditor(sign(AUDITOR_DELEGATION, ROOT), now_ms=NOW_MS),
        lambda: fresh.admit_config(sign(CONFIG, ROOT)),
        lambda: rooted.coordinator,
        lambda: rooted.admit_endpoint(sign(ENDPOINT, COORDINATOR), certificate_sha256=CERTIFICATE, now_ms=NOW_MS),
        lambda: rooted.lease(sign(LEASE, COORDINATOR)),
        lambda: delegated.config,
        lambda: delegated.config_sha256,
        lambda: delegated.lease(sign(LEASE, COORDINATOR)),
        lambda: delegated.manifest(sign(MANIFEST, COORDINATOR)),
    ]
    for step in too_early:
        with pytest.raises(RuntimeError, match="comes first"):
            step()


# --- 1: the root key -----------------------------------------------------------------------------------------


def test_step_1_stops_a_server_that_answers_with_a_run_of_its_own() -> None:
    trust = RunTrust(RUN)
    with pytest.raises(EndpointUntrusted, match=f"speaks for run {OTHER_RUN}, not for run {RUN}"):
        trust.admit_root(STRANGER.public.raw)
    with pytest.raises(RuntimeError):
        _ = trust.root


def test_step_1_refuses_a_key_of_another_length() -> None:
    with pytest.raises(SignatureInvalid, match="has 32 bytes"):
        RunTrust(RUN).admit_root(ROOT.public.raw + b"\0")


# --- 2: the delegation ---------------------------------------------------------------------------------------


def test_step_2_stops_a_coordinator_that_delegates_itself() -> None:
    with pytest.raises(SignatureInvalid):
        _after_root().admit_delegation(sign(DELEGATION, COORDINATOR), now_ms=NOW_MS)


def test_step_2_stops_a_key_delegated_in_another_role() -> None:
    for role in ("auditor", "release"):
        delegation = replace(DELEGATION, role=role)
        with pytest.raises(DelegationInvalid, match=f"delegated as {role}, not as coordinator"):
            _after_root().admit_delegation(sign(delegation, ROOT), now_ms=NOW_MS)


def test_step_2_stops_a_delegation_for_another_run_of_the_same_root() -> None:
    with pytest.raises(WrongRun):
        _after_root().admit_delegation(sign(replace(DELEGATION, run=OTHER_RUN), ROOT), now_ms=NOW_MS)


def test_step_2_stops_a_stolen_coordinator_key_after_its_time() -> None:
    envelope = sign(DELEGATION, ROOT)
    _after_root().admit_delegation(envelope, now_ms=LATER_MS + CLOCK_SKEW_MS)
    trust = _after_root()
    with pytest.raises(DelegationInvalid, match="has expired"):
        trust.admit_delegation(envelope, now_ms=LATER_MS + CLOCK_SKEW_MS + 1)
    with pytest.raises(RuntimeError):
        _ = trust.coordinator


# --- beside: auditors ----------------------------------------------------------------------------------------


def test_an_auditor_whom_the_root_delegated_is_believed_and_does_not_become_the_coordinator() -> None:
    trust = _after_delegation()
    assert trust.admit_auditor(sign(AUDITOR_DELEGATION, ROOT), now_ms=NOW_MS) == AUDITOR.public
    assert trust.coordinator == COORDINATOR.public


@pytest.mark.parametrize("signer", [AUDITOR, COORDINATOR, STRANGER])
def test_an_auditor_whom_anybody_but_the_root_named_is_refused(signer: PrivateKey) -> None:
    with pytest.raises(SignatureInvalid):
        _after_root().admit_auditor(sign(AUDITOR_DELEGATION, signer), now_ms=NOW_MS)


def test_a_key_delegated_in_another_role_does_not_judge() -> None:
    for role in ("coordinator", "release"):
        delegation = replace(AUDITOR_DELEGATION, role=role)
        with pytest.raises(DelegationInvalid, match=f"delegated as {role}, not as auditor"):
            _after_root().admit_auditor(sign(delegation, ROOT), now_ms=NOW_MS)


def test_an_auditor_of_another_run_of_the_same_root_is_refused() -> None:
    with pytest.raises(WrongRun):
        _after_root().admit_auditor(sign(replace(AUDITOR_DELEGATION, run=OTHER_RUN), ROOT), now_ms=NOW_MS)


def test_an_auditors_delegation_ends() -> None:
    envelope = sign(AUDITOR_DELEGATION, ROOT)
    _after_root().admit_auditor(envelope, now_ms=LATER_MS + CLOCK_SKEW_MS)
    with pytest.raises(DelegationInvalid, match="auditor's delegation has expired"):
        _after_root().admit_auditor(envelope, now_ms=LATER_MS + CLOCK_SKEW_MS + 1)


# --- 3: the run config ---------------------------------------------------------------------------------------


def test_step_3_stops_a_run_config_that_the_coordinator_made_up() -> None:
    with pytest.raises(SignatureInvalid):
        _after_delegation().admit_config(sign(replace(CONFIG, weights_licence="mine"), COORDINATOR))


def test_step_3_reads_a_run_config_larger_than_a_wire_document() -> None:
    large = replace(
        CONFIG,
        data=replace(CONFIG.data, shards=CONFIG.data.shards * (MAX_ENVELOPE_BYTES // 100 // 5)),
        terms="t" * 60_000,
    )
    envelope = sign(large, ROOT)
    assert len(envelope) > MAX_ENVELOPE_BYTES
    assert _after_delegation().admit_config(envelope) == large


# --- 4: the endpoint -----------------------------------------------------------------------------------------


def test_step_4_stops_a_man_in_the_middle_who_relays_the_true_statement() -> None:
    with pytest.raises(EndpointUntrusted, match="somebody may sit in between"):
        _after_config().admit_endpoint(sign(ENDPOINT, COORDINATOR), certificate_sha256="00" * 32, now_ms=NOW_MS)


@pytest.mark.parametrize("signer", [STRANGER, ROOT, DEVICE])
def test_step_4_stops_an_endpoint_statement_by_anybody_else(signer: PrivateKey) -> None:
    with pytest.raises(EndpointUntrusted, match="does not hold: The document is not signed by key"):
        _after_config().admit_endpoint(sign(ENDPOINT, signer), certificate_sha256=CERTIFICATE, now_ms=NOW_MS)


def test_step_4_stops_a_statement_for_another_run_of_the_same_coordinator() -> None:
    with pytest.raises(EndpointUntrusted, match="belongs to run"):
        _after_config().admit_endpoint(
            sign(replace(ENDPOINT, run=OTHER_RUN), COORDINATOR), certificate_sha256=CERTIFICATE, now_ms=NOW_MS
        )


def test_step_4_stops_an_old_statement_with_a_certificate_that_leaked_since() -> None:
    envelope = sign(ENDPOINT, COORDINATOR)
    trust = _after_config()
    trust.admit_endpoint(envelope, certificate_sha256=CERTIFICATE, now_ms=LATER_MS + CLOCK_SKEW_MS)
    with pytest.raises(EndpointUntrusted, match="has expired"):
        trust.admit_endpoint(envelope, certificate_sha256=CERTIFICATE, now_ms=LATER_MS + CLOCK_SKEW_MS + 1)


def test_step_4_stops_bytes_that_are_no_statement_at_all() -> None:
    for raw in (b"", b"{}", sign(LEASE, COORDINATOR)):
        with pytest.raises(EndpointUntrusted):
            _after_config().admit_endpoint(raw, certificate_sha256=CERTIFICATE, now_ms=NOW_MS)


# --- 5: what the coordinator says ----------------------------------------------------------------------------

Step = Callable[[RunTrust, bytes], object]
STEP_5: list[tuple[Step, Document]] = [
    (RunTrust.lease, LEASE),
    (RunTrust.claim_receipt, CLAIM_RECEIPT),
    (RunTrust.bytes_receipt, BYTES_RECEIPT),
    (RunTrust.verdict, VERDICT),
    (RunTrust.manifest, MANIFEST),
]


@pytest.mark.parametrize(("step", "document"), STEP_5)
@pytest.mark.parametrize("signer", [STRANGER, DEVICE, ROOT])
def test_step_5_stops_documents_by_anybody_but_the_coordinator(
    step: Step, document: Document, signer: PrivateKey
) -> None:
    with pytest.raises(SignatureInvalid):
        step(_after_config(), sign(document, signer))


@pytest.mark.parametrize(("step", "document"), STEP_5)
def test_step_5_stops_documents_of_another_run(step: Step, document: Document) -> None:
    other = replace(document, run=OTHER_RUN)
    with pytest.raises(WrongRun, match=f"belongs to run {OTHER_RUN[:12]}"):
        step(_after_config(), sign(other, COORDINATOR))


@pytest.mark.parametrize(("step", "document"), STEP_5)
def test_step_5_stops_one_kind_of_document_from_standing_in_for_another(step: Step, document: Document) -> None:
    for _, other in STEP_5:
        if other is not document:
            with pytest.raises(FormatUnknown):
                step(_after_config(), sign(other, COORDINATOR))


@pytest.mark.parametrize(("step", "document"), [STEP_5[0], STEP_5[4]])
def test_step_5_stops_leases_and_manifests_under_another_run_config(step: Step, document: Document) -> None:
    other = replace(document, config_sha256=digest_of(replace(CONFIG, name="another")))
    with pytest.raises(WrongRun, match="under another run config"):
        step(_after_config(), sign(other, COORDINATOR))


def test_step_5_takes_a_long_manifest_but_no_long_lease() -> None:
    entries = tuple(replace(MANIFEST.merged[0], claim=f"{k:064x}") for k in range(600))
    manifest = replace(MANIFEST, merged=entries)
    envelope = sign(manifest, COORDINATOR)
    assert len(envelope) > MAX_ENVELOPE_BYTES
    assert _after_config().manifest(envelope) == manifest
    with pytest.raises(EnvelopeInvalid):
        _after_config().lease(sign(LEASE, COORDINATOR) + b" " * MAX_ENVELOPE_BYTES)


def test_step_5_looks_at_the_content_after_the_signature() -> None:
    broken = replace(LEASE, round=0)
    with pytest.raises(PayloadInvalid, match="round"):
        _after_config().lease(sign(broken, COORDINATOR))
