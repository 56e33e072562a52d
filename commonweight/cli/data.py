"""`commonweight data`: pictures and captions become shards with a signed manifest; looking at them, checking them."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from commonweight.cli.data_words import caption_of, fetched, summary, suspicions
from protocol.errors import DirectoryNotEmpty, UsageError
from protocol.printing import counted, printable

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from commonweight.data.dataset import Dataset
    from commonweight.data.prepare import Progress
    from mmdit.config import MMDiTConfig
    from protocol.keys import PrivateKey

app = typer.Typer(no_args_is_help=True, help="Prepare, inspect and check data sets.")

_MIB: Final = 1 << 20
_MOST_CAPTION: Final = 4096
_SHEET: Final = 64
_EVERY_SECONDS: Final = 2.0
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A prepared data set.")]


class Text(StrEnum):
    """How captions become tokens."""

    BYTE_PATCH = "byte-patch"
    BYTES = "bytes"
    ENCODERS = "encoders"


class Device(StrEnum):
    """What networks run on."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Padding(StrEnum):
    """What stands after the end of a caption."""

    ENCODER = "encoder"
    ZEROS = "zeros"


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of pictures with .txt or .json captions beside them, WebDataset .tar files, or .parquet "
            "tables (PD12M's columns); or a folder of those.",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the data set goes.")],
    preset: Annotated[str, typer.Option(help="The model that will train on it, by name; see `commonweight models`.")],
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="As the run's model.max_tokens.")] = 64,
    text: Annotated[
        Text, typer.Option(help='As the run\'s model.text; "encoders" are the text encoders of --components.')
    ] = Text.BYTE_PATCH,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|OWNER/NAME",
            help="Frozen networks, as a folder of StableDiffusion3Pipeline has them, or that of a model hub: the "
            "autoencoder for models that paint in latents, and the text encoders for --text encoders.",
        ),
    ] = None,
    encoders: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Which text encoders: of clip_l,clip_g,t5; default: all that are there."),
    ] = "",
    padding: Annotated[
        Padding,
        typer.Option(
            help="Text after a caption's end: \"encoder\" keeps what the encoders make of it, as diffusers' pipeline "
            'hears it; "zeros" leaves it out, which is a fraction of the bytes.'
        ),
    ] = Padding.ENCODER,
    t5_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of T5.")] = 77,
    captions_only: Annotated[
        bool,
        typer.Option(
            "--captions-only",
            help="Leave the text encoders' work to volunteers: they fetch a small part of the bytes, and each of them "
            "needs the encoders (worker start --components). The held-out pictures are encoded all the same.",
        ),
    ] = False,
    networks_from: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Where others get the text encoders, as volunteers are told: an address, or OWNER/NAME@REVISION of a "
            "model hub; default: what --components says, if that is of a hub.",
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="What the networks run on.")] = Device.AUTO,
    side: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Pixels of a side, about; default: what the model is made for. Given several times, every picture is "
            "prepared in all sizes that it is large enough for, for runs with rounds.stages.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the data set; default: the directory's.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of pictures whose source names none; without it they are skipped.")
    ] = None,
    origin: Annotated[str, typer.Option(help="Where pictures come from whose source does not say.")] = "not stated",
    accept: Annotated[
        list[str] | None, typer.Option(help="Take only pictures with this licence; may be given several times.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For tables that hold links: a folder with the pictures, named by id."),
    ] = None,
    least_side: Annotated[
        int | None, typer.Option(min=1, help="Skip pictures with a shorter side; default: that of the model.")
    ] = None,
    aspect: Annotated[
        float,
        typer.Option(
            min=1.0,
            max=16.0,
            help="Longest shape, one side over the other: 1 makes squares alone, 2 also what lies between 1:2 and 2:1.",
        ),
    ] = 1.0,
    shard_mib: Annotated[float, typer.Option(min=0.01, max=1024, help="About the size of a shard, in MiB.")] = 256.0,
    heldout: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65_536,
            help="Pictures kept for validation, which nobody trains on; default: a tenth of them, at most 512.",
        ),
    ] = None,
    least_in_bucket: Annotated[
        int, typer.Option(min=1, help="With --aspect: sizes that fewer pictures have are given up.")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the shuffling.")] = 0,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The curator's key, made if it is not there; default: beside DIR, as DIR-curator.pem."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes that work at once; default: one for each core.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted preparation has left.")
    ] = False,
) -> None:
    """Make a data set: decode, skip what can't be used, cut to size, shuffle, encode, and sign a manifest.

    Interrupted, the same command goes on where it stopped. The same source, settings and seed give the same bytes. What
    is skipped, and why, stands in skipped.jsonl; what a curator should look at before publishing, in report.json; where
    each picture lies, for `data find`, in pictures.jsonl, which is not to be published.
    """
    from commonweight.components_place import find_components, said_as_usage
    from commonweight.data.chosen import AskedText, conditioning_for, encoder_for, space_for
    from commonweight.data.index import Rules
    from commonweight.data.pictures import buckets
    from commonweight.data.prepare import Recipe, begin_again
    from commonweight.data.prepare import prepare as make
    from mmdit.network_files import ComponentsMissing
    from worker.hardware import resolve_device

    shape = _shape(preset)
    place = None if components is None else find_components(components)
    if captions_only and text is not Text.ENCODERS:
        raise UsageError(
            "--captions-only goes with --text encoders; the embedded encoder's shards hold captions anyhow."
        )
    with said_as_usage():
        asked = AskedText(
            kind=text.value,
            max_tokens=max_tokens,
            encoders=tuple(name.strip() for name in encoders.split(",") if name.strip()),
            padding=padding.value,
            t5_tokens=t5_tokens,
            stored=not captions_only,
            source=_source(networks_from, components, place),
        )
        conditioning, space = conditioning_for(shape, asked, place), space_for(shape, preset, place)
        encoder = encoder_for(space, conditioning, place, resolve_device(device.value) if place else "cpu")
        sides = sorted(set(side or [space.pixel_height]))
        families = tuple(
            buckets(
                one,
                step=shape.patch_size * space.factor,
                largest=shape.pos_embed_max_size * shape.patch_size * space.factor,
                most_aspect=aspect,
            )
            for one in sides
        )
    if licence is not None and not licence.strip():
        raise UsageError("--licence is empty; leave it out to skip pictures that name none.")
    if restart:
        begin_again(out)
    rules = Rules(
        among=families[0],
        channels=encoder.channels,
        least_side=sides[0] if least_side is None else least_side,
        licence=licence,
        source=origin,
        licences=None if accept is None else tuple(sorted(set(accept))),
        most_caption=_MOST_CAPTION,
    )
    recipe = Recipe(
        name=name or out.resolve().name,
        preset=preset,
        rules=rules,
        encoder=encoder,
        seed=seed.to_bytes(32, "little"),
        shard_bytes=int(shard_mib * _MIB),
        heldout=heldout,
        least_in_bucket=least_in_bucket,
        pictures=pictures,
        families=families if len(families) > 1 else (),
    )
    curator_key = key or out.absolute().parent / f"{out.absolute().name}-curator.pem"
    began, sign_with = time.monotonic(), _curator(curator_key)
    with _told() as tell, said_as_usage(ComponentsMissing):
        manifest = make(source, out, recipe, sign_with, processes=processes or os.cpu_count() or 1, on_progress=tell)
    _say(summary(out, manifest, time.monotonic() - began))
    typer.echo(f"signed with {curator_key}; keep it: later versions of the data set should have the same curator")


@app.command()
def inspect(
    directory: Directory,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help=f"Write {_SHEET} pictures, from all shards, into one.")
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|OWNER/NAME", help="For --sheet: folder of the autoencoder that the data set was prepared with."
        ),
    ] = None,
) -> None:
    """Say what is in a data set: pictures, sizes, licences, captions, bytes of a unit, and what looks suspicious."""
    from commonweight.data.dataset import open_dataset

    dataset = open_dataset(directory)
    _say(summary(directory, dataset.manifest, None))
    typer.echo(f"curator: {dataset.curator.hex}; root {dataset.manifest.root}")
    _say(suspicions(directory))
    _say(fetched(dataset))
    if sheet is not None:
        count = _write_sheet(dataset, sheet, components)
        typer.echo(printable(f"{sheet}: {counted(count, 'picture')}"))


@app.command()
def find(
    directory: Directory,
    key: Annotated[str, typer.Argument(metavar="KEY", help="A picture's file name or id, or a part of it.")],
) -> None:
    """Say which shard and sample a picture is, in all its sizes, as `coordinator takedown` asks for it."""
    from commonweight.data.dataset import open_dataset
    from commonweight.data.whereabouts import find as places
    from commonweight.data.whereabouts import left_out

    dataset = open_dataset(directory)
    found = list(places(directory, key)) if key else []
    others = list(left_out(directory, key)) if key else []
    if not found and not others:
        raise UsageError(f"No picture in {directory} has {key[:200]!r} in its key, nor has any that was left out.")
    for placed in found:
        held = " (held out)" if placed.shard == dataset.manifest.heldout.sha256 else ""
        caption = caption_of(dataset, placed.shard, placed.sample)
        typer.echo(
            printable(
                f"{placed.key}: shard {placed.shard}, sample {placed.sample}, {placed.width}x{placed.height}{held}: "
                f"{caption}"
            )
        )
    _say(others)


@app.command(name="tiny-networks")
def tiny_networks(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the networks go; a new directory.")],
    preset: Annotated[str, typer.Option(help="The model that they are for, by name; see `commonweight models`.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all their numbers.")] = 0,
) -> None:
    """Make text encoders and an autoencoder of the classes that Stable Diffusion 3 has, small and untrained.

    For small runs that are to end as a whole pipeline of diffusers, and for trying things out: with the result, `data
    prepare --components DIR --text encoders` reads captions, and `export --components DIR` writes the pipeline.
    """
    from commonweight.components_place import said_as_usage
    from commonweight.tiny_components import write_tiny_components
    from worker.durable import trouble_with

    shape = _shape(preset)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DirectoryNotEmpty(f"{out} is there already; nothing was overwritten.")
    try:
        with said_as_usage():
            write_tiny_components(out, shape, seed=seed)
    except OSError as error:
        raise trouble_with(out, error) from None
    typer.echo(printable(f"{out}: text encoders and an autoencoder for {preset}, seed {seed}"))


@app.command()
def verify(
    directory: Directory,
    curator: Annotated[
        str | None, typer.Option(help="The curator's public key, 64 hex digits, that must have signed.")
    ] = None,
) -> None:
    """Check a data set: the curator's signature, the root, and every byte of every shard."""
    from commonweight.data.dataset import check_shards, open_dataset
    from protocol.keys import PublicKey

    dataset = open_dataset(directory, None if curator is None else PublicKey.from_hex(curator))
    check_shards(dataset)
    count = len(dataset.manifest.shards) + 1
    typer.echo(
        f"right: all {count} shards, the held-out one among them, are what the curator "
        f"{dataset.curator.hex[:12]} signed for, root {dataset.manifest.root[:12]}"
    )


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(printable(line))


def _shape(preset: str) -> "MMDiTConfig":
    from mmdit.presets import PRESETS

    if preset not in PRESETS:
        raise UsageError(f"--preset is {preset[:40]!r}; it must be one of {', '.join(sorted(PRESETS))}.")
    return PRESETS[preset]


def _source(said: str | None, components: str | None, place: Path | None) -> str:
    """Return where volunteers are told to get the text encoders."""
    from commonweight.components_place import hub_source

    if said is not None:
        return said
    return "" if components is None or place is None else hub_source(components, place)


def _curator(path: Path) -> "Callable[[], PrivateKey]":
    """Return what gives the curator's key. A new one is made only when it is asked for: many a try ends before."""
    from protocol.keys import PrivateKey

    if path.exists():
        key = PrivateKey.load(path)
        return lambda: key
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent} to write the curator's key to.")

    def make() -> PrivateKey:
        made = PrivateKey.generate()
        made.save(path)
        return made

    return make


@contextmanager
def _told() -> "Iterator[Callable[[Progress], None]]":
    """Show progress: one changing line at a terminal, a line every two seconds elsewhere."""
    last = [0.0]
    terminal = sys.stderr.isatty()

    def tell(progress: "Progress") -> None:
        now = time.monotonic()
        finished = progress.of_shards and progress.shards == progress.of_shards
        if now - last[0] < (0.1 if terminal else _EVERY_SECONDS) and not finished:
            return
        last[0] = now
        done = (
            f"shards {progress.shards:,}/{progress.of_shards:,}"
            if progress.of_shards
            else f"pictures {progress.pictures:,}/{progress.of_pictures:,}"
        )
        typer.echo(f"\r{done:<40}" if terminal else done, err=True, nl=not terminal)

    yield tell
    if terminal:
        typer.echo("", err=True)


def _write_sheet(dataset: "Dataset", path: Path, components: str | None) -> int:
    from commonweight.components_place import find_components, said_as_usage
    from commonweight.data.sheet import sheet_of
    from commonweight.png import png_bytes
    from worker.durable import trouble_with

    place = None if components is None else find_components(components)
    with said_as_usage():
        sheet, count = sheet_of(dataset, place)
    try:
        path.write_bytes(png_bytes(sheet))
    except OSError as error:
        raise trouble_with(path, error) from None
    return count
