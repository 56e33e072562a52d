"""The sections of run.toml: each setting with its type, its bounds, its default and a sentence about it."""

import ipaddress
import re
from typing import Any, Final, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coordinator.settings_problems import show
from mmdit.presets import PRESETS
from protocol.documents import RunId
from protocol.errors import JoinStringInvalid
from protocol.join import JoinString
from protocol.limits import MAX_TEXT_CHARACTERS

DEFAULT_TERMS: Final = """\
You lend this run your computer's time. The weight deltas that your computer sends, and what became of them, are part of
a public record under a pseudonym; your address and your computer's name are not. What was merged stays merged when you
leave. The trained weights are published for everybody under the licence below. There is no warranty and no pay, and you
may stop at any time."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _text(default: str, sentence: str) -> Any:
    return Field(default=default, description=sentence, min_length=1, max_length=MAX_TEXT_CHARACTERS)


class RunSettings(_Section):
    """What the run is called, and what volunteers agree to."""

    name: str = _text("digits", "Name of the run, as volunteers see it.")
    weights_licence: str = _text("Apache-2.0", "Licence of the published weights, as an SPDX identifier.")
    terms: str = Field(
        default=DEFAULT_TERMS,
        min_length=1,
        max_length=65_536,
        description="What a volunteer accepts before the first unit.",
    )


class ModelSettings(_Section):
    """The model that is trained."""

    preset: str = Field(
        default="digits",
        description='Shape of the model, by name, as `commonweight models` lists them: "digits" (8 x 8 grey pixels), '
        '"rgb16" and "rgb32" (RGB pixels), or "d12" to "d38", which paint in the latents of an autoencoder and need a '
        "data set that was prepared with one.",
    )
    text: Literal["byte-patch", "bytes", "encoders"] = Field(
        default="byte-patch",
        description='How captions become tokens: "byte-patch" takes four bytes at a time; "bytes" one, so that the '
        'model sees letters one by one and can learn to spell; "encoders" is the networks (CLIP, T5) that the data set '
        "was prepared with.",
    )
    max_tokens: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Text tokens that the model sees; what is longer is heard through the pooled vector alone. "
        'With model.text = "encoders" they have numbers of their own.',
    )

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(f"model.preset is {show(preset)}; it must be {' or '.join(map(show, sorted(PRESETS)))}.")
        return preset


class DataSettings(_Section):
    """Where the pictures come from; the shards themselves are given to `init --data`."""

    name: str = _text("scikit-learn digits", "Name of the data set.")
    source: str = _text(
        "https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak), as scikit-learn ships it",
        "Where the pictures and captions come from.",
    )
    licence: str = _text("CC-BY-4.0", "Licence of the pictures and captions.")


class TrainingSettings(_Section):
    """The inner loop of a work unit: an optimiser from zero state."""

    steps: int = Field(default=30, ge=1, le=100_000, description="Steps of one unit.")
    short_steps: int = Field(
        default=15, ge=1, le=100_000, description="Steps of a short unit, for slow machines, if there are any."
    )
    short_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the units that are short. They go first to machines that are new, or that a long one "
        "takes more than half of rounds.min_window_seconds; who finds none gets a long one, and the other way round.",
    )
    batch: int = Field(default=32, ge=1, le=65_536, description="Samples of one step.")
    lr: float = Field(default=0.004, gt=0, le=10, description="Learning rate in the first round.")
    lr_final_share: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Share of the learning rate that is left in the last planned round; "
        "0.05 ends lower in runs of hundreds of rounds.",
    )
    warmup_steps: int = Field(
        default=5, ge=0, le=100_000, description="Steps over which the rate rises, in every unit."
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1.")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="AdamW's beta2.")
    eps: float = Field(
        default=1e-8,
        ge=1e-30,  # what fp32 rounds to zero makes NaN of a weight that has no gradient
        le=1,
        description="AdamW's epsilon; 1e-4 or so where training.precision is bf16, about a fortieth of a typical "
        "gradient.",
    )
    weight_decay: float = Field(default=0.01, ge=0, le=10, description="AdamW's weight decay.")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest norm of a step's gradient.")
    text_dropout: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Share of samples trained without their caption; with several text encoders, of each by itself: "
        "Stable Diffusion 3 has 0.464 for three, so that every tenth sample hears nothing.",
    )
    shift: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Shift of the timesteps towards noise, for pictures of the model's size and the sampler as well: 1 "
        "up to 256 x 256 pixels or so, 3 at 1024 x 1024. Larger pictures of the same run are shifted further.",
    )
    segment_steps: int = Field(
        default=10, ge=1, le=100_000, description="Steps between two digests that a claim commits to."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description='"fp32", or "bf16": weights and AdamW in fp32, forward and backward pass in bf16. Quicker on most '
        "GPUs; honest machines agree less, so the tolerances must be wider.",
    )
    optimizer: Literal["adamw", "adamw-factored"] = Field(
        default="adamw",
        description='"adamw", or "adamw-factored": its second moment as means of rows and columns (Adafactor), which '
        "saves volunteers 4 bytes a parameter, and 6 with training.precision bf16.",
    )


def _power_of_two(name: str, value: int) -> int:
    if value & (value - 1):
        lower = 1 << (value.bit_length() - 1)
        raise ValueError(f"{name} is {value}; it must be a power of two, such as {lower} or {2 * lower}.")
    return value


class CodecSettings(_Section):
    """How deltas are coded on their way up: rounded with a seeded dither, packed and compressed."""

    levels: int = Field(
        default=1,
        ge=1,
        le=127,
        description="Codes are whole numbers from -levels to levels: 1 takes about 1.2 bits a parameter, 7 about 3.4, "
        "127 about 8.",
    )
    block: int = Field(default=1024, ge=16, le=65_536, description="Parameters that share a scale; a power of two.")
    reach: float = Field(
        default=2.75,
        ge=1,
        le=64,
        description="What the largest code stands for, in mean magnitudes of a block; with 7 levels or more take 5.",
    )
    width: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Width of the dither, in scales: 1 is without bias and noisy, 0 rounds to the nearest. With 7 "
        "levels or more take 1.",
    )

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int) -> int:
        return _power_of_two("codec.block", block)


class PatchSettings(_Section):
    """How each outer step is coded on its way down: what is small waits for a later patch."""

    block: int = Field(default=1024, ge=16, le=65_536, description="Parameters that share a scale; a power of two.")
    threshold: float = Field(
        default=1.275,
        ge=1 / 256,
        le=4,
        description="Share of a block's mean magnitude from which a parameter moves at once. A lower one makes patches "
        "larger and what waits smaller.",
    )

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int) -> int:
        return _power_of_two("patch.block", block)


class OuterSettings(_Section):
    """The outer step, SGD with Nesterov momentum over the merged delta (DiLoCo, arXiv 2311.08105)."""

    lr: float = Field(default=0.7, gt=0, le=10, description="Outer learning rate.")
    momentum: float = Field(
        default=0.6,
        ge=0,
        lt=1,
        description="Outer momentum. 0.8 is better if no work is late; 0.9 overshoots in runs of some tens of rounds.",
    )
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Decay of the running average of the checkpoints, which is published beside them and drawn with: "
        "0.9 looks back over about ten rounds; 0 keeps none.",
    )


class RoundsSettings(_Section):
    """Rounds: how many, how large, when one closes, and what becomes of late work."""

    planned: int = Field(default=20, ge=1, le=10_000_000, description="Rounds after which the run is finished.")
    units: int = Field(default=4, ge=1, le=1_000_000, description="Work units of a round.")
    shards_per_unit: int = Field(
        default=2, ge=1, le=65_536, description="Data shards that a unit draws its samples from."
    )
    max_mib_per_unit: int = Field(
        default=1024,
        ge=1,
        le=2**20,
        description="Most data (MiB) that a unit may ask a volunteer to fetch; `init` refuses larger shards.",
    )
    min_window_seconds: float = Field(
        default=60.0,
        ge=0,
        le=31_536_000,
        description="A round stays open at least this long, unless every unit is settled.",
    )
    min_units: int = Field(
        default=3, ge=1, le=1_000_000, description="Deltas that must have arrived before a round closes."
    )
    staleness_bound: int = Field(
        default=2, ge=0, le=1_000, description="Rounds by which work may be late and still count."
    )
    staleness_discount: float = Field(
        default=0.5, gt=0, le=1, description="What late work still weighs, for each round late."
    )
    lease_seconds: float = Field(default=300.0, ge=1, le=31_536_000, description="Time to train a unit and claim it.")
    upload_seconds: float = Field(default=300.0, ge=1, le=31_536_000, description="Time to upload a claimed delta.")
    stages: str = Field(
        default="",
        max_length=MAX_TEXT_CHARACTERS,
        description='From which round on units train on pictures of which size, such as "1:256 2001:512": the first '
        "2,000 rounds on about 256 x 256 pixels, then 512 x 512, of all proportions. Empty takes all sizes at all "
        "times.",
    )

    @field_validator("stages")
    @classmethod
    def _staged(cls, stages: str) -> str:
        try:
            parsed = parse_stages(stages)
        except ValueError:
            parsed = ((0, 0),)
        firsts, sides = [first for first, _ in parsed], [side for _, side in parsed]
        rising = firsts[:1] == [1] and firsts == sorted(set(firsts))
        if parsed and not (rising and min(sides) >= 1 and max(*firsts, *sides) < _MOST_STAGE):
            raise ValueError(
                f"rounds.stages is {show(stages)}; it must be pairs of a round and a side in pixels, rounds rising "
                'from 1, such as "1:256 2001:512".'
            )
        return stages


_MOST_STAGE: Final = 1 << 31


def parse_stages(stages: str) -> tuple[tuple[int, int], ...]:
    """Return (first round, side in pixels) of each stage of `rounds.stages`; raises ValueError."""
    pairs = (word.partition(":") for word in stages.split())
    return tuple((int(first), int(side)) for first, _, side in pairs)


class ServerSettings(_Section):
    """Where the coordinator listens and how volunteers reach it. May change at any time; restart `serve` after."""

    bind: str = Field(
        default="127.0.0.1", description='Address to listen on; "0.0.0.0" is every IPv4 address of this machine.'
    )
    port: int = Field(
        default=7700,
        ge=0,
        le=65_535,
        description="Port for volunteers (gRPC over TLS); 0 takes a free one at each start.",
    )
    public_port: int = Field(
        default=7701, ge=0, le=65_535, description="Port for public files (HTTP); 0 takes a free one."
    )
    advertised_host: str = Field(
        default="127.0.0.1", description="Name or address that volunteers use; it goes into the join string."
    )
    public_url: str | None = Field(
        default=None, description="Where the public files are reached, if not at http://ADVERTISED_HOST:PUBLIC_PORT."
    )

    @field_validator("bind")
    @classmethod
    def _address(cls, bind: str) -> str:
        try:
            ipaddress.ip_address(bind)
        except ValueError:
            raise ValueError(
                f"server.bind is {show(bind)}; it must be an IP address of this machine, "
                'such as "127.0.0.1" or "0.0.0.0".'
            ) from None
        return bind

    @field_validator("advertised_host")
    @classmethod
    def _joinable(cls, host: str) -> str:
        try:
            JoinString.parse(f"cw1:{host}:1:{'0' * 64}")
        except JoinStringInvalid:
            raise ValueError(
                f"server.advertised_host is {show(host)}; it must be a host name or an address without a port "
                f'(IPv6 in brackets), such as "train.example.org".'
            ) from None
        return host

    @field_validator("public_url")
    @classmethod
    def _url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        # As strict as a worker is: an address that it refuses would end every worker of the run.
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname is not None and len(url) <= 500
        except ValueError:  # an address in brackets that is none
            whole = False
        visible = url.isascii() and url.isprintable() and " " not in url
        if not whole or not visible or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                f"server.public_url is {show(url)}; it must be a web address, such as "
                '"https://train.example.org/files" (no password, no "?"), or be left out.'
            )
        if not _port_is_usable(parts):
            raise ValueError(f"server.public_url is {show(url)}; its port must be a whole number from 1 to 65535.")
        return url.rstrip("/")

    def join_string(self, run: RunId) -> JoinString | None:
        """Return what a volunteer needs to join, or None if the port is only known once the run is served."""
        return JoinString(host=self.advertised_host, port=self.port, run=run) if self.port else None


def _port_is_usable(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False


class StorageSettings(_Section):
    """What is kept, and how much of the disk is left alone. May change at any time; restart `serve` after."""

    retain_rounds: int = Field(
        default=0,
        ge=0,
        le=10_000_000,
        description="Rounds whose deltas are kept; 0 keeps all. Older rounds keep digests only.",
    )
    snapshot_every: int = Field(
        default=10,
        ge=1,
        le=10_000_000,
        description="Of so many checkpoints in a row one is kept whole; of the others only a patch, once they are "
        "a few rounds old.",
    )
    reserve_mib: int = Field(
        default=512, ge=0, le=2**30, description="Free space (MiB) below which uploads are refused."
    )


class VerificationSettings(_Section):
    """How claims are judged: who is audited how often, what counts as the same result, how a merge is weighed."""

    mode: Literal["replay", "none"] = Field(
        default="replay",
        description='"replay" has work units run again, by other volunteers and by the auditor; "none" checks form, '
        "size and finiteness only, for volunteers who know each other.",
    )
    tolerance: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="Least raw difference, relative to the delta, up to which a replay calls a claim honest; "
        "`commonweight verify calibrate` measures it.",
    )
    code_tolerance: float = Field(
        default=1e-3,
        gt=0,
        le=1,
        description="Squared relative difference of decoded deltas up to which two results agree.",
    )
    probation: int = Field(
        default=19,
        ge=1,
        le=10_000,
        description="Audits that a new owner must pass in a row; until then everything of it is audited.",
    )
    floor: float = Field(
        default=0.05, ge=0, le=1, description="Smallest probability with which an established owner's unit is audited."
    )
    referee_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of agreeing replicas that an auditor looks at all the same."
    )
    ramp: int = Field(
        default=40,
        ge=1,
        le=1_000_000,
        description="Audits passed in a row from which an owner's unaudited deltas count in full.",
    )
    owner_cap: float = Field(
        default=0.25,
        ge=0.001,
        le=1,
        description="Largest share of a merge that one owner may have, where others can fill the rest.",
    )
    weighting: Literal["mean", "geometric-median", "multi-krum", "nnm-clip"] = Field(
        default="nnm-clip", description="The rule that weighs the deltas of a merge by their sketches."
    )
    hostile_share: float = Field(
        default=0.4, ge=0, le=0.49, description="Share of a merge's deltas that the weighting is to withstand."
    )
    unmerge_from: float = Field(
        default=0.5,
        ge=0,
        le=100,
        description="Raw difference from which a refuted delta that was merged is taken out of the model again; below "
        "it, the honest work that would go with it is more than what is wrong in it, and it stays, without credit.",
    )
    norm_bound: float = Field(
        default=3.0,
        ge=1,
        description="A delta that is so many times larger than the median one is audited, and clipped to that.",
    )
    screen_triples: int = Field(
        default=64,
        ge=0,
        le=65_536,
        description="Held-out samples on which each unaudited delta is tried before it is merged; 0 tries none.",
    )
    evidence_sha256: str | None = Field(
        default=None,
        description="SHA-256 of the calibration that the tolerances come from; `init --calibration` sets it.",
    )

    @field_validator("evidence_sha256")
    @classmethod
    def _digest(cls, digest: str | None) -> str | None:
        if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(
                f"verification.evidence_sha256 is {show(digest)}; it must be a SHA-256 in 64 hex digits, or be left "
                "out."
            )
        return digest
