import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mmdit.conditioning import ConditioningConfig, Encoded
from mmdit.encoders import EncodersConfig, TextEncoder, conditioning_from_json, conditioning_to_json

SD3 = EncodersConfig(
    encoders=(
        TextEncoder(name="clip_l", tokens=77, width=768, pooled=768, sha256="1a" * 32),
        TextEncoder(name="clip_g", tokens=77, width=1280, pooled=1280, sha256="2b" * 32),
        TextEncoder(name="t5", tokens=77, width=4096, pooled=0, sha256="3c" * 32),
    ),
    token_dim=4096,
    pooled_dim=2048,
    padding="encoder",
)


def test_stable_diffusion_3s_encoders_stand_where_its_paper_has_them() -> None:
    layout = SD3.layout
    assert (layout.rows, layout.token_dim, layout.pooled_dim) == (154, 4096, 2048)
    places = [(part.name, part.row, part.column, part.pooled_at) for part in layout.parts]
    assert places == [("clip_l", 0, 0, 0), ("clip_g", 0, 768, 768), ("t5", 77, 0, 2048)]


def test_t5_alone_begins_at_the_first_row() -> None:
    alone = replace(SD3, encoders=SD3.encoders[2:])
    assert [(part.row, part.rows) for part in alone.layout.parts] == [(0, 77)]


def test_what_is_written_of_conditioning_is_read_back() -> None:
    for conditioning in (SD3, ConditioningConfig(kind="bytes", max_tokens=9, token_dim=64, pooled_dim=32)):
        through_json = json.loads(json.dumps(conditioning_to_json(conditioning)))
        assert conditioning_from_json(through_json) == conditioning


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"encoders": []}, "the encoders are none"),
        ({"encoders": 3}, "must be a list"),
        ({"encoders": ["clip_l"]}, "must be a list"),
        ({"padding": "ones"}, "padding is 'ones'"),
        ({"token_dim": 2000}, "does not fit into the model's 2000"),
        ({"pooled_dim": 2047}, "does not fit into the model's 4096 and 2047"),
        ({"token_dim": True}, "token_dim is True"),
        ({"unknown": 1}, "unknown"),
        ({"source": 3}, "source is 3"),
        ({"source": "x" * 201}, "at most 200 characters"),
        ({"source": "here\x1b[2J"}, "on one line"),
    ],
)
def test_a_wrong_description_is_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        conditioning_from_json({**conditioning_to_json(SD3), **change})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "bert"}, "encoder 'bert' is not known"),
        ({"tokens": 0}, "clip_l.tokens is 0"),
        ({"width": 10**9}, "clip_l.width is 1000000000"),
        ({"pooled": 0}, "the CLIPs have one"),
        ({"sha256": "xyz"}, "must be 64 hex digits"),
        ({"name": "t5"}, "T5 has none"),
    ],
)
def test_a_wrong_encoder_is_refused_by_name(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(SD3.encoders[0], **change)


def test_encoders_must_stand_in_their_order_and_clips_side_by_side() -> None:
    with pytest.raises(ValueError, match="must be of clip_l, clip_g, t5"):
        replace(SD3, encoders=tuple(reversed(SD3.encoders)))
    with pytest.raises(ValueError, match="side by side"):
        replace(SD3, encoders=(SD3.encoders[0], replace(SD3.encoders[1], tokens=50)))


def test_what_no_encoder_says_is_silence() -> None:
    clip = Encoded(tokens=np.ones((3, 768), np.float16), pooled=np.full(768, 2, np.float16))
    tokens, pooled = SD3.layout.assemble([[clip, None, None], [None, None, None]])
    assert tokens.shape == (2, 154, 4096)
    assert tokens[0].sum() == 3 * 768
    assert pooled[0].sum() == 2 * 768
    assert not tokens[1].any()
    assert not pooled[1].any()
