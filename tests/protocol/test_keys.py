import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import KeyUnreadable, SignatureInvalid
from protocol.keys import PrivateKey, PublicKey

# RFC 8032, section 7.1, test 3.
SEED = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
MESSAGE = bytes.fromhex("af82")
SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


def test_keys_and_signatures_are_those_of_rfc_8032() -> None:
    key = PrivateKey.from_seed(SEED)
    assert key.public.hex == PUBLIC
    assert key.sign(MESSAGE) == SIGNATURE
    key.public.verify(SIGNATURE, MESSAGE)


def test_a_key_is_named_by_the_digest_of_its_raw_bytes() -> None:
    key = PublicKey.from_hex(PUBLIC)
    assert key.key_id == "dac073e0123bdea59dd9b3bda9cf6037f63aca82627d7abcd5c4ac29dd74003e"


@pytest.mark.parametrize("position", [0, 31, 32, 63])
def test_a_signature_with_one_bit_changed_does_not_fit(position: int) -> None:
    changed = bytearray(SIGNATURE)
    changed[position] ^= 1
    with pytest.raises(SignatureInvalid):
        PublicKey.from_hex(PUBLIC).verify(bytes(changed), MESSAGE)


@pytest.mark.parametrize("signature", [b"", SIGNATURE[:-1], SIGNATURE + b"\0"])
def test_a_signature_of_another_length_does_not_fit(signature: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        PublicKey.from_hex(PUBLIC).verify(signature, MESSAGE)


@pytest.mark.parametrize("text", ["", "zz" * 32, PUBLIC[:-2], PUBLIC + "00", "é" * 64])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(SignatureInvalid):
        PublicKey.from_hex(text)


def test_a_generated_key_survives_saving_and_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    path = tmp_path / "key.pem"
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PrivateKey.load(path).public == key.public
    assert PrivateKey.generate().public != key.public


def test_saving_never_overwrites_a_key(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    PrivateKey.from_seed(SEED).save(path)
    before = path.read_bytes()
    with pytest.raises(KeyUnreadable, match="can't be written"):
        PrivateKey.generate().save(path)
    assert path.read_bytes() == before


def _pem_of_another_kind() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _pem_with_a_password() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", id="damaged"),
        pytest.param(_pem_of_another_kind(), id="a P-256 key"),
        pytest.param(_pem_with_a_password(), id="a key with a password"),
    ],
)
def test_a_damaged_or_foreign_key_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(KeyUnreadable, match=r"key\.pem"):
        PrivateKey.load(path)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyUnreadable, match=r"nowhere\.pem"):
        PrivateKey.load(tmp_path / "nowhere.pem")


def test_a_private_key_never_shows_its_bytes() -> None:
    key = PrivateKey.from_seed(SEED)
    assert SEED.hex() not in repr(key)
    assert repr(key) == f"PrivateKey({key.public.key_id[:12]})"
    assert not hasattr(key, "__dict__")
