"""Who this worker is: an owner's key, to which credit and bans attach, and a device key that signs sessions and claims.

Both are made on first start and kept. Losing the owner key loses the owner's standing in every run, so nothing here
ever overwrites or deletes a key.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.documents import DeviceDelegation, OwnerRevocation, sign, verify
from protocol.errors import DocumentRefused, KeyUnreadable
from protocol.keys import PrivateKey
from worker.durable import disk_named, move_durably, write_durably

OWNER_KEY: Final = "owner.pem"
DEVICE_KEY: Final = "device.pem"
REVOCATION: Final = "owner-revocation.json"
_README: Final = """\
owner.pem              your key: your standing in every run hangs on it. Keep a copy somewhere safe, show it to nobody.
device.pem             this computer's key, which your key lets act for you.
owner-revocation.json  your signed word that owner.pem is void. If it is ever stolen, give this file to the
                       operators of your runs. Keep a copy elsewhere.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Papers:
    """What a session is opened with: the key that signs it, and the signed word of the key above that lets it act."""

    key: PrivateKey
    delegation_envelope: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The keys, and the owner's signed word that the device acts for the owner."""

    owner: PrivateKey
    device: PrivateKey
    delegation_envelope: bytes

    @property
    def papers(self) -> Papers:
        """What the device opens its sessions with."""
        return Papers(key=self.device, delegation_envelope=self.delegation_envelope)


def load_or_make_identity(directory: Path) -> Identity:
    """Read the keys in `directory`; make them if the directory does not exist.

    Raises:
        KeyUnreadable: a key is missing or damaged. Nothing is made anew in that case: that would lose the old identity.
    """
    if not directory.exists():
        _make(directory)
    owner = PrivateKey.load(directory / OWNER_KEY)
    device = PrivateKey.load(directory / DEVICE_KEY)
    delegation = DeviceDelegation(owner_public_key=owner.public.hex, device_public_key=device.public.hex)
    return Identity(owner=owner, device=device, delegation_envelope=sign(delegation, owner))


def read_revocation(directory: Path, identity: Identity) -> OwnerRevocation:
    """Return the revocation that was made with the owner key; raise `KeyUnreadable` if it is missing or damaged."""
    path = directory / REVOCATION
    try:
        return verify(OwnerRevocation, path.read_bytes(), identity.owner.public)
    except (OSError, DocumentRefused) as error:
        raise KeyUnreadable(f"The owner's revocation {path} can't be read: {error}.") from None


def _make(directory: Path) -> None:
    # Made aside and renamed: after a crash there are either both keys or none.
    draft = directory.with_name(directory.name + ".new")
    with disk_named(directory):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True, mode=0o700)
    owner, device = PrivateKey.generate(), PrivateKey.generate()
    owner.save(draft / OWNER_KEY)
    device.save(draft / DEVICE_KEY)
    revocation = sign(OwnerRevocation(owner_public_key=owner.public.hex), owner)
    write_durably(draft / REVOCATION, revocation, mode=0o600)
    write_durably(draft / "README.txt", _README.encode("ascii"), mode=0o600)
    move_durably(draft, directory)
