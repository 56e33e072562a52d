"""What a curator should look at before signing for a data set: near duplicates, and captions that stand out."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from commonweight.data.index import Row
from commonweight.data.plan import skipped_by_reason

_EXAMPLES: Final = 20
_COMMON_WORD: Final = 3
"""A word in fewer captions is rare."""


def report_of(samples: Sequence[Row], skipped: Iterable[Row]) -> dict[str, Any]:
    """Return the report as JSON.

    A picture that was prepared in several sizes is several samples; only `samples` and `sizes` count it more than once.

    A poisoned data set often shows in one of three places: pictures that look alike under different captions, captions
    that are repeated, and a word that always comes with pictures that look alike (a trigger).
    """
    taken = list({(row.key, row.pixels): row for row in samples}.values())
    alike = _alike(taken)
    captions = Counter(row.caption for row in taken)
    lengths = sorted(len(row.caption) for row in taken)
    return {
        "pictures": len(taken),
        "samples": len(samples),
        "sizes_of_a_picture": max(Counter((row.key, row.pixels) for row in samples).values()),
        "skipped": dict(skipped_by_reason(skipped)),
        "licences": dict(Counter(row.licence for row in taken).most_common()),
        "sources": dict(Counter(row.source for row in taken).most_common(_EXAMPLES)),
        "sizes": dict(Counter(str(row.bucket) for row in samples).most_common()),
        "caption_characters": {
            name: lengths[min(len(lengths) - 1, round(share * (len(lengths) - 1)))]
            for name, share in (("least", 0.0), ("tenth", 0.1), ("median", 0.5), ("nine_tenths", 0.9), ("most", 1.0))
        },
        "repeated_captions": [
            {"caption": caption, "pictures": count} for caption, count in captions.most_common(_EXAMPLES) if count > 1
        ],
        "near_duplicates": [
            {
                "pictures": len(rows),
                "captions": len({row.caption for row in rows}),
                "keys": [row.key for row in rows[:5]],
            }
            for rows in alike[:_EXAMPLES]
        ],
        "words_of_look_alikes": _trigger_words(taken, alike),
    }


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Return groups of pictures with the same look, the largest first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.look].append(row)
    return sorted((found for found in groups.values() if len(found) > 1), key=lambda found: (-len(found), found[0].key))


def _trigger_words(rows: Sequence[Row], alike: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Return words of several captions all of whose pictures look like one another."""
    looks: dict[str, set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for row in rows:
        for word in set(row.caption.lower().split()):
            looks[word].add(row.look)
            counts[word] += 1
    grouped = {found[0].look for found in alike}
    words = [
        word
        for word, count in counts.items()
        if count >= _COMMON_WORD and len(looks[word]) == 1 and looks[word] <= grouped
    ]
    return [{"word": word, "pictures": counts[word]} for word in sorted(words, key=lambda word: (-counts[word], word))][
        :_EXAMPLES
    ]
