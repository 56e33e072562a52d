"""A log that follows the rules holds, and each way to spare a friend or to haunt a stranger leaves its mark."""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import ClaimReceipt, Digest, Training, Verification
from protocol.errors import LogDiffers
from protocol.log import EMPTY_LOG_HEAD, LogEntry, next_head
from tests.protocol.examples import CONFIG, RUN
from verify.draws import DrawReport, check_draws
from verify.policy import ONE, audit_share, is_drawn, is_sampled

TRAINING = replace(CONFIG.training, steps=30, batch=4, short_steps=10, short_share=ONE // 2)
LONG, SHORT = 120, 40
RULES = replace(CONFIG.verification, probation=2, floor=ONE // 4, referee_share=ONE // 2)
ADA, BOB, EVE = ("a1" * 32, "b2" * 32, "c3" * 32)
AUDITOR = "f0" * 32
SECRETS = {epoch: hashlib.sha256(b"epoch %d" % epoch).digest() for epoch in range(1, 4)}


class Book:
    """Writes a log as an honest coordinator does; tests then change what it wrote."""

    def __init__(self, rules: Verification = RULES, training: Training = TRAINING) -> None:
        self.rules = rules
        self.training = training
        self.most = training.steps * training.batch
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.records: dict[str, tuple[bool, int]] = {}
        self.audits = self.claims = 0
        self.epoch = 0

    def add(self, kind: str, **body: Any) -> int:
        self.lines.append((kind, body))
        return len(self.lines)

    def entries(self) -> list[LogEntry]:
        head, found = EMPTY_LOG_HEAD, []
        for position, (kind, body) in enumerate(self.lines, 1):
            raw = canonical_json(body)
            head = next_head(head, kind, raw)
            found.append(LogEntry(position=position, kind=kind, body=raw, head=head))
        return found

    def check(self, *receipts: ClaimReceipt) -> DrawReport:
        return check_draws(self.entries(), self.rules, self.training, receipts)

    def open(self, epoch: int) -> None:
        self.epoch = epoch
        self.add("epoch-opened", epoch=epoch, secret_sha256=sha256_hex(SECRETS[epoch]))

    def reveal(self, epoch: int) -> None:
        self.add("epoch-revealed", epoch=epoch, secret=SECRETS[epoch].hex())

    def share(self, member: str, samples: int | None = None) -> int:
        established, row = self.records.get(member, (False, 0))
        of_long = audit_share(self.rules, established=established, valid_in_row=row)
        return of_long if of_long == ONE else of_long * (samples or self.most) // self.most

    def claim(
        self, member: str, *, drawn: bool | None = None, sampled: bool | None = None, samples: int | None = None
    ) -> Digest:
        """Log a claim and its bytes; look for a digest that the epoch's secret treats as asked."""
        samples = samples or self.most
        share, secret = self.share(member, samples), SECRETS[self.epoch]
        while True:
            self.claims += 1
            claim = Digest(hashlib.sha256(b"claim %d" % self.claims).hexdigest())
            if drawn not in (None, is_drawn(secret, claim, share)):
                continue
            if sampled in (None, is_sampled(secret, claim, self.rules.referee_share)):
                break
        self.add("claim", claim=claim, member=member, epoch=self.epoch, audit_share=share, samples=samples)
        self.add("bytes", claim=claim)
        return claim

    def audit(self, claim: Digest, reason: str) -> int:
        self.audits += 1
        self.add("audit", audit=self.audits, claim=claim, reason=reason)
        return self.audits

    def opinion(self, audit: int, claim: Digest, finding: str = "confirmed") -> None:
        self.add(
            "opinion", audit=audit, claim=claim, auditor=AUDITOR, finding=finding, raw_difference=0, code_difference=0
        )

    def passed(self, member: str) -> None:
        established, row = self.records.get(member, (False, 0))
        self.records[member] = (established, row + 1)
        self.owner(member, "audit-passed")
        if not established and row + 1 >= self.rules.probation:
            self.records[member] = (True, row + 1)
            self.owner(member, "promoted")

    def owner(self, member: str, event: str) -> None:
        established, row = self.records[member]
        state = "banned" if event == "banned" else "established" if established else "probation"
        self.add("owner", member=member, event=event, state=state, valid_in_row=row)

    def verdict(self, claim: Digest, code: str = "MERGED") -> None:
        merged = code == "MERGED"
        outcome = "accepted" if code in ("MERGED", "REPLICA", "TOO_LATE") else "rejected"
        self.add("verdict", claim=claim, code=code, outcome=outcome, weight=7 if merged else 0, checkpoint=None)

    def refereed(self, member: str, reason: str = "probation", **which: bool) -> Digest:
        claim = self.claim(member, **which)
        self.opinion(self.audit(claim, reason), claim)
        self.passed(member)
        self.verdict(claim)
        return claim


def honest() -> Book:
    """Two newcomers who become established, a replica that agrees, a cheat that is caught, an unrevealed epoch."""
    book = Book()
    book.open(1)
    for member in (ADA, BOB, ADA, BOB):
        book.refereed(member)
    book.reveal(1)
    book.open(2)
    claim = book.claim(ADA, drawn=True, sampled=False)
    audit = book.audit(claim, "drawn")
    replica = book.claim(BOB, drawn=False)
    book.add("agreed", audit=audit, claim=claim, replica=replica)
    book.passed(ADA)
    book.verdict(replica, "REPLICA")
    book.verdict(claim)
    book.verdict(book.claim(BOB, drawn=False))
    cheat = book.claim(EVE)
    book.opinion(book.audit(cheat, "probation"), cheat, "refuted")
    book.verdict(cheat, "REPLAY_DIFFERS")
    book.records[EVE] = (False, 0)
    book.owner(EVE, "banned")
    book.reveal(2)
    book.open(3)
    book.claim(ADA, drawn=False)
    return book


def test_an_honest_log_holds_and_says_what_its_audits_cost() -> None:
    report = honest().check()

    assert (report.epochs, report.revealed) == (3, 2)
    assert (report.claims, report.delivered) == (9, 9)
    assert (report.drawn, report.audited) == (6, 6)
    assert report.audits == {"drawn": 1, "probation": 5}
    assert (report.replicas, report.replays, report.refuted) == (1, 5, 1)
    assert report.overhead == 6 / 8


def test_a_short_units_claim_has_a_smaller_probability_in_an_honest_log() -> None:
    book = honest()
    book.claim(ADA, drawn=False, samples=SHORT)
    assert book.lines[-2][1]["audit_share"] == book.share(ADA) * SHORT // LONG < book.share(ADA)
    assert book.check().claims == 10


def test_kinds_that_draws_do_not_depend_on_and_members_that_are_not_known_pass_unread() -> None:
    book = honest()
    book.add("closed", round=1)
    book.add("bytes", claim=book.lines[1][1]["claim"], colour="blue")

    assert book.check().claims == 9


def change(kind: str, which: int = 0, **changes: Any) -> Callable[[Book], None]:
    """Give an entry of a kind other members; None takes one out."""

    def spoil(book: Book) -> None:
        body = [body for found, body in book.lines if found == kind][which]
        body.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del body[name]

    return spoil


def drop(kind: str, which: int = 0) -> Callable[[Book], None]:
    def spoil(book: Book) -> None:
        places = [place for place, (found, _) in enumerate(book.lines) if found == kind]
        del book.lines[places[which]]

    return spoil


def append(act: Callable[[Book], object]) -> Callable[[Book], None]:
    return lambda book: (act(book), None)[1]


def spared_friend(book: Book) -> None:
    book.claim(ADA, drawn=True)
    book.reveal(3)


def unfinished_audit(book: Book) -> None:
    book.audit(book.claim(ADA, drawn=True), "drawn")
    book.reveal(3)


def merged_before_its_audit(book: Book) -> None:
    claim = book.claim(ADA, drawn=True)
    audit = book.audit(claim, "drawn")
    book.verdict(claim)
    book.opinion(audit, claim)
    book.reveal(3)


def merged_after_the_secret_was_out(book: Book) -> None:
    claim = book.claim(ADA, drawn=True)
    book.audit(claim, "drawn")
    book.verdict(claim, "TOO_LATE")
    book.reveal(3)
    book.verdict(claim)


def haunted_stranger(book: Book) -> None:
    claim = book.claim(BOB, drawn=False)
    book.opinion(book.audit(claim, "drawn"), claim)
    book.reveal(3)


def newcomers_agree(book: Book) -> None:
    claim = book.claim("d4" * 32)
    audit = book.audit(claim, "probation")
    replica = book.claim("e5" * 32)
    book.verdict(replica, "REPLICA")
    book.add("agreed", audit=audit, claim=claim, replica=replica)
    book.verdict(claim)
    book.reveal(3)


def no_referee_where_one_was_drawn(book: Book) -> None:
    claim = book.claim(ADA, drawn=True, sampled=True)
    audit = book.audit(claim, "drawn")
    replica = book.claim(BOB, drawn=False)
    book.verdict(replica, "REPLICA")
    book.add("agreed", audit=audit, claim=claim, replica=replica)
    book.verdict(claim)
    book.reveal(3)


def promoted_without_audits(book: Book) -> None:
    book.passed("d4" * 32)


def established_by_decree(book: Book) -> None:
    book.records["d4" * 32] = (True, 0)
    book.owner("d4" * 32, "audit-failed")


def forgiven(book: Book) -> None:
    book.records[ADA] = (True, 40)
    book.owner(ADA, "audit-failed")


def claim_after_the_secret(book: Book) -> None:
    book.reveal(3)
    book.claim(ADA, drawn=False)


CHEATS: dict[str, tuple[Callable[[Book], None], str]] = {
    "another secret": (change("epoch-revealed", secret="00" * 32), "not the one that was promised"),
    "a secret revealed twice": (append(lambda book: book.reveal(2)), "not open"),
    "a secret never promised": (change("epoch-revealed", epoch=7), "not open"),
    "a claim after the secret": (claim_after_the_secret, "everybody knew the secret"),
    "an epoch opened twice": (append(lambda book: book.open(3)), "again, or out of order"),
    "an older epoch": (change("claim", -1, epoch=2), "newest epoch"),
    "a size that no unit has": (change("claim", -1, samples=41), "is for 41 samples, as many as no unit"),
    "a long unit said to be short": (change("claim", -1, samples=SHORT), "its owner's record gives"),
    "a lower probability": (change("claim", 0, audit_share=ONE // 20), "its owner's record gives 16777216"),
    "a higher probability": (change("claim", -1, audit_share=ONE), "its owner's record gives"),
    "a claim twice": (append(lambda book: book.lines.append(book.lines[1])), "logged twice"),
    "an unknown claim": (append(lambda book: book.add("bytes", claim="77" * 32)), "not in the log"),
    "an unknown replica": (change("agreed", replica="77" * 32), "is not in the log"),
    "a member missing": (change("claim", 0, member=None), r"Entry 2 \(claim\): member"),
    "a drawn claim spared": (spared_friend, "none was opened"),
    "an audit without an end": (unfinished_audit, "had no end"),
    "merged before its audit": (merged_before_its_audit, "merged before one had confirmed it"),
    "merged after the revelation": (merged_after_the_secret_was_out, "merged before one had confirmed it"),
    "an opinion taken out": (drop("opinion"), "merged before|does not show"),
    "a claim haunted": (haunted_stranger, "the secret did not draw it"),
    "newcomers vouching": (newcomers_agree, "merged before one had confirmed it"),
    "no referee": (no_referee_where_one_was_drawn, "for a referee, who never came"),
    "a record of nothing": (promoted_without_audits, "an audit that the log does not show"),
    "trust by decree": (established_by_decree, "without having been promoted"),
    "a failure forgiven": (forgiven, "the log makes it 0"),
    "promotion too soon": (drop("owner"), "the log makes it|does not show|its owner's record gives"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_every_way_round_the_draw_is_found_and_named(cheat: str) -> None:
    spoil, said = CHEATS[cheat]
    book = honest()
    spoil(book)

    with pytest.raises(LogDiffers, match=said):
        book.check()


def test_a_drawn_claim_that_is_judged_for_another_reason_needs_no_audit() -> None:
    book = honest()
    book.verdict(book.claim(ADA, drawn=True), "OWNER_BANNED")
    withheld = book.claim(ADA, drawn=True)
    book.lines.pop()  # its bytes never came
    book.verdict(withheld, "FORFEIT")
    book.reveal(3)

    assert book.check().revealed == 3


def receipt_of(book: Book, number: int, **changes: Any) -> ClaimReceipt:
    """What the volunteer of the log's claim `number` was given."""
    places = [place for place, (kind, _) in enumerate(book.lines, 1) if kind == "claim"]
    body = book.lines[places[number] - 1][1]
    secret = SECRETS[body["epoch"]]
    receipt = ClaimReceipt(
        run=RUN,
        claim=body["claim"],
        epoch=body["epoch"],
        log_position=places[number],
        sketch_seed=hmac.new(secret, bytes.fromhex(body["claim"]), hashlib.sha256).hexdigest(),
        audit_share=body["audit_share"],
        secret_sha256=sha256_hex(secret),
    )
    return replace(receipt, **changes)


def test_a_volunteers_own_receipts_are_held_against_the_log() -> None:
    book = honest()
    later = receipt_of(book, 0, claim="99" * 32, log_position=1000)

    report = book.check(receipt_of(book, 0), receipt_of(book, 8), later)

    assert (report.receipts, report.unlogged) == (2, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"secret_sha256": "00" * 32}, "another secret"),
        ({"sketch_seed": "00" * 32}, "sketch seed that does not follow"),
        ({"audit_share": 1}, "another place, epoch or probability"),
        ({"log_position": 4}, "another place, epoch or probability"),
        ({"claim": "99" * 32}, "is not in the log, though its receipt says entry 2"),
    ],
)
def test_a_receipt_that_promised_something_else_is_named(changes: dict[str, Any], said: str) -> None:
    book = honest()

    with pytest.raises(LogDiffers, match=said):
        book.check(receipt_of(book, 0, **changes))
