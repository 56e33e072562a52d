import ast
import inspect
import itertools

from protocol import limits
from protocol.documents import Claim, sign
from tests.protocol.examples import CLAIM, CONFIG, DEVICE, MANIFEST, ROOT

NUMBERS = {name: value for name, value in vars(limits).items() if name.isupper()}


def test_every_limit_is_a_positive_whole_number() -> None:
    assert all(type(value) is int and value > 0 for value in NUMBERS.values())


def test_every_limit_but_the_units_says_what_it_is_for() -> None:
    body = ast.parse(inspect.getsource(limits)).body
    named = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    explained = {
        before.target.id
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr)
    }
    units = {"KIB", "MIB", "GIB", "SECOND_MS", "MINUTE_MS", "HOUR_MS", "DAY_MS"}
    assert set(named) == set(NUMBERS)
    # A sketch's size in bytes follows from its number of floats.
    assert set(named) - explained - {"SKETCH_BYTES"} == units


def test_an_upload_chunk_and_the_largest_envelope_fit_into_one_message() -> None:
    overhead = 1024
    assert limits.UPLOAD_CHUNK_BYTES + overhead < limits.MAX_RECEIVE_BYTES
    assert 2 * limits.MAX_ENVELOPE_BYTES + overhead < limits.MAX_RECEIVE_BYTES
    assert limits.SKETCH_BYTES + overhead < limits.MAX_RECEIVE_BYTES
    assert 32 * limits.MAX_VERDICT_QUERIES + overhead < limits.MAX_RECEIVE_BYTES


def test_a_full_answer_about_verdicts_fits_into_what_a_worker_receives() -> None:
    # A verdict's envelope is at most about 1.5 KiB: two digests, a sentence of 500 characters, base64.
    assert limits.MAX_VERDICT_QUERIES * 4 * limits.KIB < 2 * limits.MAX_RECEIVE_BYTES


def test_a_claim_is_far_below_the_largest_envelope() -> None:
    assert len(sign(CLAIM, DEVICE)) < limits.MAX_ENVELOPE_BYTES // 64
    assert Claim.FORMAT == 1


def test_documents_of_a_usual_run_are_far_below_the_largest_public_one() -> None:
    assert len(sign(CONFIG, ROOT)) * 1000 < limits.MAX_PUBLIC_DOCUMENT_BYTES
    assert len(sign(MANIFEST, ROOT)) * 1000 < limits.MAX_PUBLIC_DOCUMENT_BYTES


def test_a_call_for_work_ends_well_before_its_session() -> None:
    assert limits.LEASE_WAIT_MS * 4 < limits.NONCE_MS + limits.SESSION_MS
    assert limits.NONCE_MS < limits.SESSION_MS
