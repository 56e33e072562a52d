"""Ed25519 keys: making, storing, naming, signing and verifying.

A key is named by the SHA-256 of its 32 public bytes; the run's id is the name of its root key.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import KeyUnreadable, SignatureInvalid

KeyId = NewType("KeyId", str)
"""SHA-256 of the raw public key, 64 hex digits."""

PUBLIC_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKey:
    """An Ed25519 public key: 32 raw bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != PUBLIC_KEY_BYTES:
            raise SignatureInvalid(f"An Ed25519 public key has 32 bytes, this one has {len(self.raw)}.")

    @classmethod
    def from_hex(cls, text: str) -> "PublicKey":
        """Read the key from 64 hex digits; raise `SignatureInvalid` otherwise."""
        try:
            return cls(raw=bytes.fromhex(text))
        except ValueError:
            raise SignatureInvalid("A public key is written as 64 hex digits.") from None

    @property
    def hex(self) -> str:
        """The key as 64 hex digits."""
        return self.raw.hex()

    @property
    def key_id(self) -> KeyId:
        """The key's name."""
        return KeyId(hashlib.sha256(self.raw).hexdigest())

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise `SignatureInvalid` unless `signature` is this key's over `message`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise SignatureInvalid(f"The signature by key {self.key_id[:12]} does not fit these bytes.") from None


class PrivateKey:
    """An Ed25519 private key. It can sign, say its public half, and be stored; its bytes are never shown."""

    __slots__ = ("_key", "public")

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(
            raw=key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        )

    @classmethod
    def generate(cls) -> "PrivateKey":
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> "PrivateKey":
        """Make the key of a 32-byte seed (tests and golden files)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> "PrivateKey":
        """Read a PKCS#8 PEM file; raise `KeyUnreadable` if it is missing, damaged or of another kind."""
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise KeyUnreadable(f"The key file {path} can't be read: {error}.") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyUnreadable(f"The key file {path} holds no Ed25519 key.")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write a new PKCS#8 PEM file with mode 0600; never overwrite one (raises `KeyUnreadable`)."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise KeyUnreadable(f"The key file {path} can't be written: {error}.") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature over `message`; Ed25519 gives the same bytes each time."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"PrivateKey({self.public.key_id[:12]})"
