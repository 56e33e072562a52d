import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import (
    DOCUMENTS,
    Delegation,
    Document,
    Endpoint,
    Lease,
    Manifest,
    RunConfig,
    Verdict,
    digest_of,
    envelope_digest,
    parse_payload,
    payload_of,
    sign,
    verify,
)
from protocol.errors import DocumentRefused, EnvelopeInvalid, FormatUnknown, PayloadInvalid, SignatureInvalid
from tests.protocol.examples import (
    CLAIM,
    CLAIM_RECEIPT,
    CONFIG,
    COORDINATOR,
    DELEGATION,
    DEVICE,
    ENDPOINT,
    EXAMPLES,
    LEASE,
    MANIFEST,
    OPINION,
    STRANGER,
    VERDICT,
)

Path = tuple[str | int, ...]


def _name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _members(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every member of a JSON value, however deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from _members(child, (*path, key))


def _with(payload: bytes, path: Path, value: Any) -> bytes:
    whole = json.loads(payload)
    parent = whole
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return json.dumps(whole).encode()


def _without(payload: bytes, path: Path) -> bytes:
    whole = json.loads(payload)
    parent = whole
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return json.dumps(whole).encode()


FREE = {"model", "conditioning", "space", "encoder"}
"""Objects that `mmdit` reads; their insides are its business."""
ALL_MEMBERS = [
    pytest.param(document, path, id=".".join([_name(document), *map(str, path)]))
    for document in EXAMPLES
    for path in _members(json.loads(payload_of(document)))
    if not (path[0] in FREE and len(path) > 1)
]
NAMED_MEMBERS = [param for param in ALL_MEMBERS if isinstance(param.values[1][-1], str)]  # type: ignore[index]


def test_there_is_an_example_of_every_document() -> None:
    assert tuple(type(example) for example in EXAMPLES) == DOCUMENTS


def test_every_document_has_a_media_type_of_its_own() -> None:
    types = [kind.TYPE for kind in DOCUMENTS]
    assert len(set(types)) == len(types)
    assert all(name.startswith("application/vnd.commonweight.") and name.endswith("+json") for name in types)


@pytest.mark.parametrize("document", EXAMPLES, ids=_name)
def test_a_document_comes_back_from_its_bytes(document: Document) -> None:
    payload = payload_of(document)
    again = parse_payload(type(document), payload)
    assert again == document
    assert payload_of(again) == payload == canonical_json(json.loads(payload))
    assert digest_of(again) == sha256_hex(payload)


@pytest.mark.parametrize("document", EXAMPLES, ids=_name)
def test_a_signed_document_comes_back_and_only_under_its_signers_key(document: Document) -> None:
    envelope = sign(document, COORDINATOR)
    assert verify(type(document), envelope, COORDINATOR.public) == document
    assert envelope_digest(type(document), envelope, COORDINATOR.public) == digest_of(document)
    with pytest.raises(SignatureInvalid):
        verify(type(document), envelope, STRANGER.public)


@pytest.mark.parametrize("document", EXAMPLES, ids=_name)
def test_a_document_is_not_taken_for_any_other_kind(document: Document) -> None:
    envelope = sign(document, COORDINATOR)
    for kind in DOCUMENTS:
        if kind is not type(document):
            with pytest.raises(FormatUnknown):
                verify(kind, envelope, COORDINATOR.public)


GOLDEN = {
    "Delegation": "81f5cf758968518e",
    "DeviceDelegation": "8f6635b1f9579ba7",
    "OwnerRevocation": "4d6f00807a6db35e",
    "Endpoint": "8b84b4caeb8afd1e",
    "SessionProof": "fc816c6eddabd9b5",
    "RunConfig": "5b9f9b295a328638",
    "Lease": "27492b2fcbe567d2",
    "Claim": "0b66d8373fa00864",
    "ClaimReceipt": "e25f5505c9e798dc",
    "BytesReceipt": "cc31ac9123e113f9",
    "Verdict": "7cdfcef308ef5cb1",
    "Opinion": "f6829da74d16fde0",
    "DatasetManifest": "953f990b27ab9ae3",
    "Manifest": "80493e1abc650b00",
    "Takedowns": "51bb9b405273984f",
}


def test_documents_have_golden_digests() -> None:
    assert {_name(example): digest_of(example)[:16] for example in EXAMPLES} == GOLDEN


def test_documents_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CLAIM.samples = 1  # type: ignore[misc]


@pytest.mark.parametrize(("document", "path"), NAMED_MEMBERS)
def test_no_member_may_be_missing(document: Document, path: Path) -> None:
    with pytest.raises(DocumentRefused):
        parse_payload(type(document), _without(payload_of(document), path))


@pytest.mark.parametrize(("document", "path"), ALL_MEMBERS)
def test_no_member_may_be_of_another_type(document: Document, path: Path) -> None:
    payload = payload_of(document)
    original = json.loads(payload)
    for key in path:
        original = original[key]
    wrong: Any
    for wrong in (True, "\u2603 no such thing" * 40, 1.5, -1, [], [[]], {"a": []}):
        is_number = type(original) in (int, float) and type(wrong) in (int, float)
        is_text = isinstance(original, str) and isinstance(wrong, str) and path[-1] == "terms"
        is_object = isinstance(original, dict) and isinstance(wrong, dict) and path[-1] in FREE
        is_empty_list = path in {("merged",), ("unmerged",), ("skipped",), ("rounds", "stages")} and wrong == []
        is_flag = isinstance(original, bool) and isinstance(wrong, bool)
        if is_number or is_text or is_object or is_empty_list or is_flag:
            continue  # the right type; ranges have their own test
        with pytest.raises(DocumentRefused):
            parse_payload(type(document), _with(payload, path, wrong))


BAD_PATHS = ("", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".x", "a/.x", "a\\b", "a\0b", "a b", "a\n", "C:")
OUT_OF_RANGE: list[tuple[Document, Path, Any]] = [
    (LEASE, ("run",), "AB" * 32),
    (LEASE, ("run",), "ab" * 32 + "\n"),
    (LEASE, ("run",), "ab" * 33),
    (LEASE, ("lease",), "ab" * 32),
    (LEASE, ("round",), 0),
    (LEASE, ("round",), 2**53),
    (LEASE, ("index",), -1),
    (LEASE, ("shards",), []),
    (LEASE, ("artifacts",), []),
    (LEASE, ("artifacts",), [{"role": f"r{k}", "max_bytes": 1} for k in range(5)]),
    (LEASE, ("artifacts", 0, "role"), "../delta"),
    (LEASE, ("artifacts", 0, "role"), ""),
    (LEASE, ("artifacts", 0, "role"), "d" * 33),
    (LEASE, ("duration_ms",), 2**53),
    (CLAIM, ("samples",), 1.0),
    (CLAIM, ("samples",), "7"),
    (CLAIM, ("loss",), "0.5"),
    (CLAIM, ("loss",), None),
    (CLAIM, ("trainer_version",), "v" * 257),
    (CLAIM, ("device_class",), "d" * 257),
    (CLAIM, ("artifacts", 0, "size"), -1),
    (DELEGATION, ("role",), "owner"),
    (DELEGATION, ("not_after_ms",), -1),
    (ENDPOINT, ("public_url",), "ftp://example.org"),
    (ENDPOINT, ("public_url",), "file:///etc/passwd"),
    (ENDPOINT, ("public_url",), "http://"),
    (ENDPOINT, ("public_url",), "http://example.org/a b"),
    (ENDPOINT, ("public_url",), "http://example.org/\n"),
    (VERDICT, ("outcome",), "maybe"),
    (VERDICT, ("code",), "lower case"),
    (VERDICT, ("sentence",), "s" * 501),
    (VERDICT, ("checkpoint",), -1),
    (MANIFEST, ("files",), []),
    (MANIFEST, ("state",), []),
    (MANIFEST, ("merged", 0, "weight"), 2**24 + 1),
    (MANIFEST, ("merged", 0, "weight"), -1),
    (MANIFEST, ("merged", 0, "round"), 0),
    *((MANIFEST, ("files", 0, "path"), path) for path in BAD_PATHS),
    (CONFIG, ("verification", "mode"), "trust me"),
    (CONFIG, ("verification", "floor"), 2**24 + 1),
    (CONFIG, ("verification", "owner_cap"), 0),
    (CONFIG, ("verification", "hostile_share"), 2**23),
    (CONFIG, ("verification", "tolerance"), 0),
    (CONFIG, ("verification", "code_tolerance"), 1.5),
    (CONFIG, ("verification", "probation"), 0),
    (CONFIG, ("verification", "referee_share"), -1),
    (CONFIG, ("verification", "ramp"), 0),
    (CONFIG, ("verification", "weighting"), "loudest"),
    (CONFIG, ("verification", "norm_bound"), 0.5),
    (CONFIG, ("verification", "unmerge_from"), -0.5),
    (CONFIG, ("verification", "screen_triples"), 65_537),
    (CONFIG, ("verification", "evidence_sha256"), "e7"),
    (CLAIM_RECEIPT, ("audit_share",), 2**24 + 1),
    (CLAIM_RECEIPT, ("secret_sha256",), "secret"),
    (MANIFEST, ("merged", 0, "influence"), 2**24 + 1),
    (MANIFEST, ("merged", 0, "late"), -1),
    (MANIFEST, ("unmerged", 0, "checkpoint"), 0),
    (MANIFEST, ("unmerged", 0, "weight"), -1),
    (MANIFEST, ("weigh_seed",), "5d"),
    (OPINION, ("finding",), "maybe"),
    (OPINION, ("raw_difference",), -1.0),
    (OPINION, ("code_difference",), -1.0),
    (OPINION, ("seconds",), -0.5),
    (CONFIG, ("terms",), "t" * 65_537),
    (CONFIG, ("data", "shards"), []),
    (CONFIG, ("data", "shards", 0, "samples"), 0),
    (CONFIG, ("training", "steps"), 0),
    (CONFIG, ("training", "steps"), 100_001),
    (CONFIG, ("training", "batch"), 65_537),
    (CONFIG, ("training", "segment_steps"), 0),
    (CONFIG, ("training", "text_dropout"), 65_537),
    (CONFIG, ("training", "precision"), "fp8"),
    (CONFIG, ("codec", "kind"), "pickle"),
    (CONFIG, ("codec", "levels"), 0),
    (CONFIG, ("codec", "levels"), 128),
    (CONFIG, ("codec", "block"), 8),
    (CONFIG, ("codec", "reach"), 255),
    (CONFIG, ("codec", "reach"), 2.75),
    (CONFIG, ("codec", "width"), 257),
    (CONFIG, ("patch", "kind"), "pickle"),
    (CONFIG, ("patch", "block"), 8),
    (CONFIG, ("patch", "threshold"), 0),
    (MANIFEST, ("snapshot",), -1),
    (CONFIG, ("rounds", "planned"), 0),
    (CONFIG, ("rounds", "staleness_bound"), 1_001),
    (CONFIG, ("rounds", "staleness_discount"), 2**24 + 1),
    (CONFIG, ("rounds", "lease_ms"), 999),
]  # fmt: skip


@pytest.mark.parametrize(("document", "path", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_and_its_member_named(document: Document, path: Path, value: Any) -> None:
    with pytest.raises(PayloadInvalid) as caught:
        parse_payload(type(document), _with(payload_of(document), path, value))
    assert ".".join(map(str, path)) in str(caught.value)
    assert _name(document) in str(caught.value)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize(
    ("document", "member"),
    [
        (CLAIM, b'"loss":0.125'),
        (CONFIG, b'"norm_bound":3'),
        (CONFIG, b'"tolerance":0.001'),
        (OPINION, b'"raw_difference":0.0000015'),
        (OPINION, b'"code_difference":0'),
        (OPINION, b'"seconds":12.5'),
    ],
)
def test_a_measurement_that_is_no_finite_number_is_refused(document: Document, member: bytes, number: bytes) -> None:
    payload = payload_of(document)
    changed = payload.replace(member, member.partition(b":")[0] + b":" + number)
    assert changed != payload
    with pytest.raises(PayloadInvalid):
        parse_payload(type(document), changed)


@pytest.mark.parametrize("document", EXAMPLES, ids=_name)
def test_members_that_a_reader_does_not_know_are_ignored(document: Document) -> None:
    payload = _with(payload_of(document), ("from_the_future",), {"any": ["thing", 1.5, None]})
    assert parse_payload(type(document), payload) == document


@pytest.mark.parametrize("document", EXAMPLES, ids=_name)
@pytest.mark.parametrize("number", ["older", "newer", 0, "1", 1.0, True, None, [1], "\ud800"])
def test_an_unknown_format_is_refused_before_anything_else_is_read(document: Document, number: Any) -> None:
    known = document.FORMAT
    number = {"older": known - 1, "newer": known + 1}.get(number, number) if isinstance(number, str) else number
    payload = json.dumps({"format": number}).encode()
    with pytest.raises(FormatUnknown, match=f"this version reads format {known}") as caught:
        parse_payload(type(document), payload)
    str(caught.value).encode()  # it goes into a gRPC status


def test_a_payload_without_a_format_is_refused() -> None:
    with pytest.raises(FormatUnknown, match="format None"):
        parse_payload(Lease, _without(payload_of(LEASE), ("format",)))


@pytest.mark.parametrize("payload", [b"", b"[]", b"1", b"null", b'"text"', b"\xff", b'{"format":1,"format":1}'])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(PayloadInvalid):
        parse_payload(Verdict, payload)


def test_a_document_longer_than_allowed_is_refused_before_it_is_parsed() -> None:
    envelope = sign(CONFIG, COORDINATOR)
    assert verify(RunConfig, envelope, COORDINATOR.public, max_bytes=len(envelope)) == CONFIG
    with pytest.raises(EnvelopeInvalid):
        verify(RunConfig, envelope, COORDINATOR.public, max_bytes=len(envelope) - 1)


def test_accepting_terms_binds_their_words_and_the_licence() -> None:
    other_terms = dataclasses.replace(CONFIG, terms="Be unkind.")
    other_licence = dataclasses.replace(CONFIG, weights_licence="none")
    assert len({CONFIG.terms_sha256, other_terms.terms_sha256, other_licence.terms_sha256}) == 3
    assert dataclasses.replace(CONFIG, name="renamed").terms_sha256 == CONFIG.terms_sha256


def test_a_claim_is_bound_to_everything_that_its_lease_says() -> None:
    assert CLAIM.lease_sha256 == digest_of(LEASE)
    for field in dataclasses.fields(LEASE):
        value: Any = getattr(LEASE, field.name)
        other: Any = value + 1 if isinstance(value, int) else value[::-1] + value[:1]
        assert digest_of(dataclasses.replace(LEASE, **{field.name: other})) != CLAIM.lease_sha256, field.name


def test_a_manifest_finds_its_files_by_path_and_by_role() -> None:
    entry = MANIFEST.files[0]
    assert MANIFEST.file(entry.path) is entry
    assert MANIFEST.state_file("weights") is entry
    assert MANIFEST.state_file("momentum") is None
    with pytest.raises(PayloadInvalid, match=r"checkpoint 2 lists no file nowhere\.txt"):
        MANIFEST.file("nowhere.txt")
    dangling = dataclasses.replace(MANIFEST, state=(dataclasses.replace(MANIFEST.state[0], path="nowhere.txt"),))
    with pytest.raises(PayloadInvalid):
        dangling.state_file("weights")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PAYLOADS = {kind: payload_of(example) for kind, example in zip(DOCUMENTS, EXAMPLES, strict=True)}
PATHS = {kind: list(_members(json.loads(payload))) for kind, payload in PAYLOADS.items()}


def _parse_or_refuse(kind: type[Document], payload: bytes) -> None:
    try:
        document = parse_payload(kind, payload)
    except DocumentRefused as refusal:
        str(refusal).encode()
    else:
        assert isinstance(document, kind)


@given(kind=st.sampled_from(DOCUMENTS), payload=st.binary(max_size=100))
def test_random_bytes_raise_nothing_but_a_refusal(kind: type[Document], payload: bytes) -> None:
    _parse_or_refuse(kind, payload)


@given(kind=st.sampled_from(DOCUMENTS), value=JSON)
def test_random_json_raises_nothing_but_a_refusal(kind: type[Document], value: Any) -> None:
    members = {**value, "format": 1} if isinstance(value, dict) else value
    _parse_or_refuse(kind, json.dumps(members).encode())


@settings(max_examples=400)
@given(data=st.data(), kind=st.sampled_from(DOCUMENTS), value=JSON)
def test_a_random_value_in_any_member_raises_nothing_but_a_refusal(
    data: st.DataObject, kind: type[Document], value: Any
) -> None:
    path = data.draw(st.sampled_from(PATHS[kind]))
    payload = _with(PAYLOADS[kind], path, value)
    _parse_or_refuse(kind, payload)
    if path[0] not in FREE and path != ("format",):
        try:
            document = parse_payload(kind, payload)
        except DocumentRefused:
            return
        # What was taken can be written again, and means the same.
        assert parse_payload(kind, payload_of(document)) == document


@given(data=st.data(), kind=st.sampled_from(DOCUMENTS))
def test_a_payload_with_some_bytes_changed_raises_nothing_but_a_refusal(
    data: st.DataObject, kind: type[Document]
) -> None:
    payload = bytearray(PAYLOADS[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    _parse_or_refuse(kind, bytes(payload))


def test_the_examples_are_signed_by_who_signs_them() -> None:
    assert CLAIM.device == LEASE.device == DEVICE.public.key_id
    assert CLAIM_RECEIPT.claim == VERDICT.claim == MANIFEST.merged[0].claim == digest_of(CLAIM)
    assert {Delegation, Endpoint, Manifest} <= set(DOCUMENTS)
