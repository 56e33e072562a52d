"""Where the text of a sample comes from: out of its shard, or from its caption.

A shard can hold captions, encoded text, or both. Who trains, and who trains again, must hear the same; so every source
gives half precision, and nothing here is random.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from mmdit.conditioning import ConditioningConfig, Encoded, TextLayout, TextPart, encode_caption

_CACHED: Final = 64
_CACHED_BYTES: Final = 256 * 1024
"""Of one caption's tokens at most, so that what is kept stays a few megabytes; longer ones are made each time."""

Kept = Sequence[Sequence[bool]]
"""For each sample and part whether its text is heard; what is not need not be made, and is None instead."""

Encode = Callable[[Sequence[str], Kept | None], Sequence[Sequence[Encoded | None]]]
"""What runs a run's text encoders: for each caption one text for each part (`mmdit.components.TextEncoders.encode`)."""


class TextHolder(Protocol):
    """What a source needs of a shard."""

    def caption(self, i: int) -> str | None:
        """Return the caption of sample `i`, if the shard holds captions."""
        ...

    def stored(self, part: str, i: int | None) -> Encoded | None:
        """Return the encoded text of sample `i`, or of the empty caption, if the shard holds it."""
        ...


class TextSource(Protocol):
    """Gives what the model hears."""

    @property
    def layout(self) -> TextLayout:
        """Its encoders, and where their numbers go."""
        ...

    def encoded(
        self, samples: Sequence[tuple[TextHolder, int]], kept: Kept | None = None
    ) -> Sequence[Sequence[Encoded | None]]:
        """Return for each sample one text for each part, but for those that are not `kept`; None keeps all."""
        ...

    def empty(self, holder: TextHolder) -> Sequence[Encoded]:
        """Return what each encoder makes of the empty caption."""
        ...


class TextMissing(ValueError):
    """A shard does not hold what a source is to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTexts:
    """Text that was encoded when the shards were made."""

    layout: TextLayout

    def encoded(
        self, samples: Sequence[tuple[TextHolder, int]], kept: Kept | None = None
    ) -> Sequence[Sequence[Encoded | None]]:
        """Read the shards; raises `TextMissing`."""
        return [
            [_stored(holder, part, i) if one else None for part, one in zip(self.layout.parts, heard, strict=True)]
            for (holder, i), heard in zip(samples, _kept(samples, self.layout, kept), strict=True)
        ]

    def empty(self, holder: TextHolder) -> Sequence[Encoded]:
        """Read a shard; raises `TextMissing`. Without a name it is the embedded encoder, for which it is nothing."""
        return [_nothing(part) if not part.name else _stored(holder, part, None) for part in self.layout.parts]


@dataclass(slots=True, kw_only=True)
class CaptionTexts:
    """Captions through text encoders that run here, a batch at a time; text that a shard holds is taken from it.

    Nothing is kept from batch to batch: what a network makes of a caption depends in its last digits on what else is in
    the batch, and whoever trains again must hear the same.

    Args:
        encode: None where no encoder is at hand; then only what shards hold can be heard.
    """

    layout: TextLayout
    encode: Encode | None
    _empty: Sequence[Encoded] | None = None

    def encoded(
        self, samples: Sequence[tuple[TextHolder, int]], kept: Kept | None = None
    ) -> Sequence[Sequence[Encoded | None]]:
        """Read the shards, and encode the captions of all samples whose text is not there; raises `TextMissing`.

        Each encoder gets those captions alone that are to be heard through it: with Stable Diffusion 3's dropout about
        half of them.
        """
        heard = _kept(samples, self.layout, kept)
        held = [self._held(holder, i) for holder, i in samples]
        missing = [number for number, texts in enumerate(held) if texts is None]
        captions = [_caption(*samples[number]) for number in missing]
        made = iter(self._encode(captions, [heard[number] for number in missing]))
        return [next(made) if texts is None else texts for texts in held]

    def empty(self, holder: TextHolder) -> Sequence[Encoded]:
        """Read the shard, or encode the empty caption, once; raises `TextMissing`."""
        held = self._held(holder, None)
        if held is not None:
            return held
        if self._empty is None:
            (texts,) = self._encode([""], [[True] * len(self.layout.parts)])
            self._empty = [text for text in texts if text is not None]
        return self._empty

    def _held(self, holder: TextHolder, i: int | None) -> Sequence[Encoded] | None:
        texts = [holder.stored(part.name, i) for part in self.layout.parts]
        found = [text for text in texts if text is not None]
        return found if len(found) == len(texts) else None

    def _encode(self, captions: Sequence[str], kept: Kept) -> Sequence[Sequence[Encoded | None]]:
        if not captions:
            return ()
        if self.encode is None:
            raise TextMissing("it holds captions alone, and no text encoder is loaded to hear them")
        made = self.encode(captions, kept)
        for texts, heard in zip(made, kept, strict=True):
            if any(text is None and one for text, one in zip(texts, heard, strict=True)):
                raise TextMissing("a text encoder of the run is not loaded")
        return made


def _kept(samples: Sequence[tuple[TextHolder, int]], layout: TextLayout, kept: Kept | None) -> Kept:
    return [[True] * len(layout.parts)] * len(samples) if kept is None else kept


def _caption(holder: TextHolder, i: int) -> str:
    caption = holder.caption(i)
    if caption is None:
        raise TextMissing("it holds neither captions nor what text encoders made of them")
    return caption


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTexts:
    """Captions as bytes, encoded when they are needed: a caption is a hundredth part of what is made of it."""

    conditioning: ConditioningConfig

    @property
    def layout(self) -> TextLayout:
        """The embedded encoder alone."""
        return self.conditioning.layout

    def encoded(
        self, samples: Sequence[tuple[TextHolder, int]], kept: Kept | None = None
    ) -> Sequence[Sequence[Encoded | None]]:
        """Encode captions, or read what was encoded; raises `TextMissing`."""
        return [
            [self._text(holder, i) if one else None]
            for (holder, i), (one,) in zip(samples, _kept(samples, self.layout, kept), strict=True)
        ]

    def empty(self, holder: TextHolder) -> Sequence[Encoded]:  # noqa: ARG002  it is the same for all
        """No tokens and zeros."""
        return [_nothing(self.layout.parts[0])]

    def _text(self, holder: TextHolder, i: int) -> Encoded:
        caption = holder.caption(i)
        if caption is None:
            return _stored(holder, self.layout.parts[0], i)
        short = 2 * self.conditioning.max_tokens * self.conditioning.token_dim <= _CACHED_BYTES
        return _encode_cached(caption, self.conditioning) if short else _encode(caption, self.conditioning)


@functools.lru_cache(maxsize=_CACHED)
def _encode_cached(caption: str, conditioning: ConditioningConfig) -> Encoded:
    return _encode(caption, conditioning)


def _encode(caption: str, conditioning: ConditioningConfig) -> Encoded:
    tokens, pooled = encode_caption(caption, conditioning)
    return Encoded(tokens=tokens, pooled=pooled)


def _stored(holder: TextHolder, part: TextPart, i: int | None) -> Encoded:
    found = holder.stored(part.name, i)
    if found is None:
        raise TextMissing(f"it holds no text of {part.name or 'the embedded encoder'}, and captions alone do not do")
    return found


def _nothing(part: TextPart) -> Encoded:
    return Encoded(tokens=np.zeros((0, part.width), np.float16), pooled=np.zeros(part.pooled, np.float16))
