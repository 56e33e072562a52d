"""What an export says of itself: a model card as Hugging Face's hub reads it, and the metadata of a file of weights."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Final

from commonweight.provenance import Provenance
from mmdit.encoders import EncodersConfig
from mmdit.export import EMA_PATH
from mmdit.precision import Precision
from mmdit.space import VaeSpace
from protocol.printing import printable

_HUB_LICENCES: Final = frozenset(
    {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0"}
    | {"agpl-3.0", "mit", "openrail", "unlicense"}
)
"""Those SPDX identifiers that are the hub's as well, in small letters; it calls all others "other"."""
_TORCH: Final[dict[Precision, str]] = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def metadata(origin: Provenance | None) -> dict[str, str]:
    """Return the metadata of a safetensors file: texts by key; "format" alone if nothing is known."""
    said = {"format": "pt"}
    if origin is not None:
        data = origin.data
        said |= {
            "license": origin.licence,
            "commonweight.run": origin.run_id,
            "commonweight.run_name": origin.run_name,
            "commonweight.checkpoint": str(origin.checkpoint),
            "commonweight.weights": origin.path,
            "commonweight.weights_sha256": origin.sha256,
            "commonweight.data": data.name,
            "commonweight.data_source": data.source,
            "commonweight.data_license": data.licence,
            "commonweight.data_root": data.root,
            "commonweight.data_shards": " ".join(shard.sha256 for shard in data.shards),
        }
    return said


def model_card(
    origin: Provenance | None,
    precision: Precision,
    *,
    encoders: EncodersConfig | None = None,
    autoencoder: VaeSpace | None = None,
    whole: bool = False,
    lacking: Sequence[str] = (),
) -> str:
    """Return README.md of an exported directory: YAML for the hub, then the same for people, and how to load it.

    Args:
        origin: where the weights come from, if that is known.
        precision: of the weights.
        encoders: the text encoders, if the model hears captions through some.
        autoencoder: of the latents, if the model paints in some.
        whole: whether they lie there too, so that the directory is a whole pipeline.
        lacking: the parts that a whole pipeline does not have, which must be said when it is opened.
    """
    lines = ["---", *_front_matter(origin), "---", "", *(_known(origin) if origin else _unknown()), ""]
    lines += ["## How to use it", ""]
    if whole and encoders is not None:
        lines += [*_pipeline(encoders, precision, lacking), ""]
    lines += [
        "The transformer, in diffusers' layout:",
        "",
        "```python",
        "import torch",
        "from diffusers import SD3Transformer2DModel",
        "",
        f'model = SD3Transformer2DModel.from_pretrained(".", subfolder="transformer", dtype={_TORCH[precision]})',
        "```",
        "",
        *_own_sampler(networks=bool(encoders or autoencoder) and not whole),
    ]
    if encoders is not None or autoencoder is not None:
        lines += ["", *_networks(encoders, autoencoder, whole=whole)]
    if origin is not None:
        lines += ["", *_shards(origin)]
    return "\n".join(lines) + "\n"


def _pipeline(encoders: EncodersConfig, precision: Precision, lacking: Sequence[str]) -> Iterator[str]:
    t5 = [encoder.tokens for encoder in encoders.encoders if encoder.name == "t5"]
    yield "All of it; the number of T5's tokens is what the model was trained with:" if t5 else "All of it:"
    yield ""
    yield "```python"
    yield "import torch"
    yield "from diffusers import StableDiffusion3Pipeline"
    yield ""
    without = "".join(f"{part}=None, " for part in lacking)
    yield f'pipeline = StableDiffusion3Pipeline.from_pretrained(".", {without}dtype={_TORCH[precision]})'
    yield f'pipeline("a caption"{"".join(f", max_sequence_length={tokens}" for tokens in t5)}).images[0]'
    yield "```"


def _own_sampler(*, networks: bool) -> Iterator[str]:
    yield "`commonweight.json` says how captions and pictures become numbers; Commonweight draws with all of it:"
    yield ""
    yield "```sh"
    yield f'commonweight sample . "a caption" -o picture.png{" --components FOLDER" if networks else ""}'
    yield "```"
    if networks:
        yield ""
        yield "FOLDER holds the networks that are named below, as `StableDiffusion3Pipeline` has them."


def _networks(encoders: EncodersConfig | None, autoencoder: VaeSpace | None, *, whole: bool) -> Iterator[str]:
    """Say whose the frozen networks are, and which: by the digests that the run goes by."""
    yield "## Networks of others"
    yield ""
    yield "The model was trained with these, which the run did not make: they are others' work, with licences of their"
    yield f"own. {'They are here as they were, so' if whole else 'They are not here:'} look where they were published."
    if encoders is not None and encoders.source:
        yield f"The text encoders were got from {_plain(encoders.source)}."
    yield ""
    for encoder in () if encoders is None else encoders.encoders:
        yield f"- Text encoder `{encoder.name}`, SHA-256 of its files `{encoder.sha256}`"
    if autoencoder is not None:
        yield f"- Autoencoder, SHA-256 of its files `{autoencoder.sha256}`"
    elif whole:
        yield ""
        yield "The autoencoder in `vae` is none of them: it hands pixels through, and Commonweight has made it."


def _front_matter(origin: Provenance | None) -> Iterator[str]:
    if origin is not None:
        hub = origin.licence.lower()
        if hub in _HUB_LICENCES:
            yield f"license: {hub}"
        else:
            yield "license: other"
            yield f"license_name: {_quoted(origin.licence)}"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    yield "tags:"
    yield "- commonweight"
    if origin is not None:
        yield "commonweight:"
        yield f"  run: {_quoted(origin.run_id)}"
        yield f"  checkpoint: {origin.checkpoint}"
        yield f"  weights_sha256: {_quoted(origin.sha256)}"


def _known(origin: Provenance) -> Iterator[str]:
    data = origin.data
    what = "the running average of the weights" if origin.path == EMA_PATH.as_posix() else "the weights themselves"
    yield f"# {_plain(origin.run_name)}, checkpoint {origin.checkpoint}"
    yield ""
    yield "A text-to-image transformer (MMDiT) of a run that volunteers train with Commonweight."
    yield ""
    yield f"- Run: `{origin.run_id}`"
    yield f"- Checkpoint: {origin.checkpoint}, {what}; SHA-256 of that file there: `{origin.sha256}`"
    yield f"- Licence of the weights: {_plain(origin.licence)}"
    yield f"- Data that it trains on: {_plain(data.name)}, from {_plain(data.source)}, licence {_plain(data.licence)}"
    if data.curator is not None:
        yield f"- Curator of the data: `{data.curator}`"
    if origin.takedowns_sha256 is not None:
        yield (
            "- Pictures were taken down meanwhile; no unit of a later round was trained on them: they are listed in "
            f"the run's takedowns/{origin.takedowns_sha256}.json"
        )
    yield ""
    yield "The published checkpoint carries the signatures; `commonweight checkpoint verify` checks it, not this copy."


def _unknown() -> Iterator[str]:
    yield "# A text-to-image transformer"
    yield ""
    yield "It was exported from a directory without a run's manifest: which run it is of, its licence and its data are"
    yield "not known."


def _shards(origin: Provenance) -> Iterator[str]:
    samples = sum(shard.samples for shard in origin.data.shards)
    number = "1 shard" if len(origin.data.shards) == 1 else f"{len(origin.data.shards):,} shards"
    yield "## The shards behind it"
    yield ""
    yield f"{samples:,} samples in {number}, by SHA-256; their Merkle root is `{origin.data.root}`."
    yield ""
    yield "```text"
    yield from (shard.sha256 for shard in origin.data.shards)
    yield "```"


def _plain(text: str) -> str:
    """What a stranger wrote, without what Markdown or HTML would make something of."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", printable(text))


def _quoted(text: str) -> str:
    return json.dumps(printable(text), ensure_ascii=False)  # a text of JSON is one of YAML
