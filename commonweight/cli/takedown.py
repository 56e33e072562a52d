"""`commonweight coordinator takedown`: find a picture, show what was found, and have no later unit train on it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protocol.errors import ConsentNeeded, TakedownRefused, UsageError
from protocol.printing import counted, printable

if TYPE_CHECKING:
    from coordinator.directory import RunDirectory
    from coordinator.takedowns import Book, Start
    from protocol.documents import RunConfig

_LEAST_DIGITS = 8
_CAPTION_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A sample of one of the run's shards, with its caption if the shard holds captions."""

    shard: str
    sample: int
    caption: str | None
    heldout: bool

    def line(self) -> str:
        """Return what a person sees of it."""
        words = "no caption in the shard" if self.caption is None else f'"{self.caption[:_CAPTION_CHARACTERS]}"'
        held = " (held out: nothing is trained on it, the validation loss is measured on it)" if self.heldout else ""
        return printable(f"  shard {self.shard[:12]}, sample {self.sample}: {words}{held}")


def takedown(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory.")],
    reason: Annotated[str, typer.Option(help="Why, in a few words. Everybody can read it: name nobody.")],
    shard: Annotated[
        str | None, typer.Option(metavar="HEX", help="The picture's shard: 8 or more digits of its SHA-256.")
    ] = None,
    sample: Annotated[int | None, typer.Option(metavar="N", min=0, help="The picture's number in it, from 0.")] = None,
    caption: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of a number: every picture with this in its caption.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether these are the ones.")] = False,
) -> None:
    """Take pictures down: no unit of a later round trains on them. Works whether the run is served or not.

    It can't be undone, and what was learnt from a picture stays in the weights.
    """
    from coordinator.directory import RunDirectory
    from coordinator.takedowns import Asked, ask, book_of

    if (sample is None) == (caption is None) or (sample is not None and shard is None) or caption == "":
        raise UsageError("Name a picture by --shard and --sample, or pictures by a part of their --caption.")
    run = RunDirectory(directory)
    trust = run.trust()
    book = book_of(run, trust)
    shards = _shards(trust.config, shard)
    found = (
        _numbered(run, trust.config, shards, sample, book)
        if caption is None
        else _captioned(run, trust.config, shards, caption, book)
    )
    wanted = [Asked(shard=picture.shard, sample=picture.sample, reason=reason) for picture in found]
    for asked in wanted:
        book.add(asked)
    for picture in found:
        typer.echo(picture.line())
    _confirm(len(found), yes=yes)
    for line in _report(len(found), ask(run, wanted)):
        typer.echo(line)


def _shards(config: "RunConfig", named: str | None) -> Sequence[str]:
    """Return the shards that are meant: all of them, or the one whose digest begins so."""
    every = [shard.sha256 for shard in (*config.data.shards, config.data.heldout)]
    if named is None:
        return every
    text = named.strip().lower()
    meant = [shard for shard in every if shard.startswith(text)]
    if len(text) < _LEAST_DIGITS or len(meant) != 1:
        raise TakedownRefused(
            f"--shard {printable(named)[:80]} is the beginning of {len(meant)} of the run's {len(every)} shards; give "
            f"{_LEAST_DIGITS} or more digits of the SHA-256 of one, which its file under public/shards is named by."
        )
    return meant


def _numbered(
    run: "RunDirectory", config: "RunConfig", shards: Sequence[str], sample: int | None, book: "Book"
) -> Sequence[Picture]:
    assert sample is not None  # or there is a caption
    (shard,) = shards
    book.check(shard, sample)
    return [_picture(run, config, shard, sample)]


def _captioned(
    run: "RunDirectory", config: "RunConfig", shards: Sequence[str], text: str, book: "Book"
) -> Sequence[Picture]:
    from diloco.shards import Shard
    from protocol.layout import shard_path

    found: list[Picture] = []
    captions = already = 0
    for name in shards:
        opened = Shard.open(run.public / shard_path(name))
        captions += opened.has_captions
        for sample in range(opened.n if opened.has_captions else 0):
            if text.casefold() not in (opened.caption(sample) or "").casefold():
                continue
            already += book.has(name, sample)
            if not book.has(name, sample):
                found.append(_of(config, name, sample, opened.caption(sample)))
    if not captions:
        raise TakedownRefused("The run's shards hold no captions to look in; name a picture by --shard and --sample.")
    if not found:
        more = f", but {already} that are taken down already" if already else ""
        raise TakedownRefused(f"No picture has {printable(text)[:80]!r} in its caption{more}; nothing was taken down.")
    return found


def _picture(run: "RunDirectory", config: "RunConfig", shard: str, sample: int) -> Picture:
    from diloco.shards import Shard
    from protocol.layout import shard_path

    return _of(config, shard, sample, Shard.open(run.public / shard_path(shard)).caption(sample))


def _of(config: "RunConfig", shard: str, sample: int, caption: str | None) -> Picture:
    return Picture(shard=shard, sample=sample, caption=caption, heldout=shard == config.data.heldout.sha256)


def _confirm(count: int, *, yes: bool) -> None:
    if yes:
        return
    these = "this picture" if count == 1 else f"these {count:,} pictures"
    if not sys.stdin.isatty():
        raise ConsentNeeded(f"Nothing was taken down: nobody is here to say whether {these} are meant. Give --yes.")
    if not typer.confirm(f"Take {these} down? It can't be undone"):
        raise ConsentNeeded("Nothing was taken down, as you said.")


def _report(count: int, start: "Start") -> Sequence[str]:
    these, them = counted(count, "picture"), "it" if count == 1 else "them"
    first, last = start.earliest, start.latest
    since = f"round {last}"
    if first < last:
        since = f"round {first}, or of round {last} if checkpoint {first - 1} was being made by then,"
    return [
        f"{these} taken down: units of {since} and later leave {them} out, and anybody can check it",
        "The list and the reason are public once the next checkpoint is: takedowns.json beside run.json.",
        "What this does not do: units of the round before may still train on them, what was learnt stays in the",
        "weights, and the shards' bytes, the pictures in them, stay published under their digests for replays.",
    ]
