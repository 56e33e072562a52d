"""Epochs: each round's secret, promised by its hash when the round opens, is told when all that it drew is settled."""

from coordinator.desk import Desk

_REVEALED = "epochs_revealed"


def reveal_epochs(desk: Desk, published: int) -> int:
    """Reveal the secret of each epoch up to `published` whose drawn claims are settled; return how many.

    A claim whose bytes may still come in time holds its epoch's secret back, drawn or not: bytes that come when
    everybody knows that they were not drawn are audited (`AuditReason.OVERDUE`), which honest work should not cost.
    After the last planned round nothing can be merged any more, and nothing is waited for.
    """
    over = published >= desk.config.rounds.planned
    first = int(desk.store.meta(_REVEALED) or 0) + 1
    revealed = 0
    for epoch in range(first, published + 1):
        awaited = 0 if over else desk.store.awaited_count(epoch, desk.clock.now_ms())
        if desk.store.in_doubt_count(epoch) or awaited:
            break  # in their order: whoever reads the log need not search for a gap
        desk.log("epoch-revealed", {"epoch": epoch, "secret": desk.epoch_secret(epoch).hex()})
        desk.store.put_meta(_REVEALED, str(epoch))
        revealed += 1
    return revealed


def is_revealed(desk: Desk, epoch: int) -> bool:
    """Say whether an epoch's secret is public, so that everybody knows which of its claims were drawn."""
    return epoch <= int(desk.store.meta(_REVEALED) or 0)
