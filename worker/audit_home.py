"""Where an auditor keeps its key, its delegation and what it signed.

HOME/lock                          held while an auditor runs
HOME/auditor.pem                   its key (0600), made by `commonweight auditor init`
HOME/delegation.json               the root's word that the key is an auditor's, made by the run's operator
HOME/opinions/RUN/CLAIM.json       every opinion that it signed: its own record, whatever the coordinator says
HOME/judging/                      deltas that are being judged; emptied at every start and after every audit
HOME/cache/                        public files by digest; can be deleted at any time
"""

import shutil
from pathlib import Path
from typing import Final

from protocol.documents import Digest, RunId
from protocol.errors import DelegationInvalid, KeyUnreadable
from protocol.keys import PrivateKey, PublicKey
from protocol.limits import MAX_DELEGATION_BYTES
from worker.durable import disk_named, write_durably
from worker.identity import Papers

KEY: Final = "auditor.pem"
DELEGATION: Final = "delegation.json"


def make_key(home: Path) -> PublicKey:
    """Return the public half of the auditor's key in a directory; make the key if there is none.

    Raises:
        KeyUnreadable: there is one, and it is damaged.
    """
    path = home / KEY
    if path.exists():
        return PrivateKey.load(path).public
    with disk_named(home):
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = PrivateKey.generate()
    key.save(path)
    return key.public


def load_papers(key: Path, delegation: Path) -> Papers:
    """Return what an auditor's session is opened with.

    Raises:
        KeyUnreadable: the key is missing or damaged; the sentence says how to make one.
        DelegationInvalid: the delegation is missing or too large; whether it holds is for the run to say.
    """
    if not key.exists():
        raise KeyUnreadable(f"There is no auditor's key at {key}; `commonweight auditor init` makes one.")
    try:
        envelope = delegation.read_bytes()
    except OSError as error:
        raise DelegationInvalid(
            f"The auditor's delegation {delegation} can't be read ({error.strerror}); the run's operator makes one "
            "from the public key, with `commonweight coordinator delegate`."
        ) from None
    if len(envelope) > MAX_DELEGATION_BYTES:
        raise DelegationInvalid(f"{delegation} is no delegation: it has {len(envelope):,} bytes.")
    return Papers(key=PrivateKey.load(key), delegation_envelope=envelope)


class Workbench:
    """The files of the audit in work, and the opinions that were signed. Methods block; one thread at a time."""

    def __init__(self, home: Path, run: RunId) -> None:
        self._judging = home / "judging"
        self._opinions = home / "opinions" / run
        with disk_named(home):
            self._opinions.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.clear()

    def clear(self) -> None:
        """Remove every delta that was judged: it is another's unpublished work."""
        with disk_named(self._judging):
            shutil.rmtree(self._judging, ignore_errors=True)
            self._judging.mkdir(parents=True, mode=0o700)

    def container(self, claim: Digest) -> Path:
        """Return the place of a claim's delta."""
        return self._judging / f"{claim}.safetensors.zst"

    def come(self, claim: Digest) -> int:
        """Return how many bytes of a claim's delta are here."""
        path = self.container(claim)
        return path.stat().st_size if path.exists() else 0

    def append(self, claim: Digest, piece: bytes) -> None:
        """Add the next bytes of a claim's delta."""
        path = self.container(claim)
        with disk_named(path), path.open("ab") as file:
            file.write(piece)

    def discard(self, claim: Digest) -> None:
        """Forget what has come of a claim's delta."""
        self.container(claim).unlink(missing_ok=True)

    def keep_opinion(self, claim: Digest, envelope: bytes) -> None:
        """Keep a signed opinion for the record; a later one on the same claim takes its place."""
        write_durably(self._opinions / f"{claim}.json", envelope)
