"""The lists of pictures taken down that a worker has seen, held against each other: none may rewrite an older one."""

from collections.abc import Callable
from typing import Final

from protocol.documents import Manifest, Takedowns
from protocol.errors import AnswerInvalid, Refusal
from protocol.layout import takedowns_path
from protocol.limits import MAX_TAKEDOWNS_BYTES
from protocol.takedowns import check_grown, check_takedowns
from protocol.trust import RunTrust
from worker.progress import TakenDown

_KEPT: Final = 16
Document = Callable[[str, int], bytes]
"""Returns a public file by its path, if it has no more than so many bytes."""


class TakedownLists:
    """Fetches the lists that manifests name. Use from one thread at a time.

    Args:
        tell: told when there is more in the newest list than before.
    """

    def __init__(self, tell: Callable[[TakenDown], None]) -> None:
        self._tell = tell
        self._by_digest: dict[str, Takedowns] = {}
        self._newest: tuple[int, Takedowns | None] | None = None

    def named_by(self, manifest: Manifest, trust: RunTrust, document: Document) -> Takedowns | None:
        """Return the list that a manifest names, verified; None if it names none.

        Raises:
            AnswerInvalid: the list does not hold, or rewrites one that was seen before.
            Unreachable, ServerBusy: it can't be fetched now.
        """
        try:
            found = self._list(manifest, trust, document)
            if self._newest is not None:
                (older, before), (_, after) = sorted(
                    [self._newest, (manifest.checkpoint, found)], key=lambda seen: seen[0]
                )
                check_grown(before, after, older)
        except Refusal as refusal:
            raise AnswerInvalid(f"The list of pictures taken down does not hold: {refusal.message}") from None
        if self._newest is None or manifest.checkpoint > self._newest[0]:
            known = 0 if self._newest is None or self._newest[1] is None else len(self._newest[1].entries)
            self._newest = (manifest.checkpoint, found)
            if found is not None and len(found.entries) > known:
                self._tell(
                    TakenDown(
                        round=manifest.checkpoint + 1, pictures=len(found.entries), new=len(found.entries) - known
                    )
                )
        return found

    def _list(self, manifest: Manifest, trust: RunTrust, document: Document) -> Takedowns | None:
        digest = manifest.takedowns_sha256
        if digest is None:
            return None
        if digest not in self._by_digest:
            found = read_takedowns(digest, trust, document)
            while len(self._by_digest) >= _KEPT:
                del self._by_digest[next(iter(self._by_digest))]  # the one that was read first
            self._by_digest[digest] = found
        check_takedowns(self._by_digest[digest], trust.config, manifest.checkpoint)
        return self._by_digest[digest]


def read_takedowns(digest: str, trust: RunTrust, document: Document) -> Takedowns:
    """Return a list by its digest; raise `DocumentRefused` or `WrongRun` if what lies there is not that list."""
    return trust.takedowns(document(takedowns_path(digest), MAX_TAKEDOWNS_BYTES), digest)
