import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.skills.bench import QUICK
from benchmarks.skills.judge import judge
from benchmarks.skills.lettering import FONTS, lettering
from benchmarks.skills.pictures import draw, draw_many, write_folder
from benchmarks.skills.prompts import (
    COLOURS,
    HELD_BESIDE,
    HELD_COLOURS,
    HELD_COUNTS,
    HELD_STACKED,
    HELD_WORDS,
    SHAPES,
    SKILLS,
    Prompt,
    Thing,
    almost,
    coloured,
    heldout_prompts,
    placed,
    spelt,
    training_prompt,
)
from benchmarks.skills.score import asked, loaded, score
from benchmarks.skills.training import CHUNK_STEPS, Recipe, Training, run
from commonweight.data.sources import items_of

TINY = replace(QUICK, batch=4, threads=2)


def test_a_seed_gives_the_same_pictures_and_another_seed_others() -> None:
    prompts, pictures = draw_many((3, 1), 40)
    again, drawn_again = draw_many((3, 1), 40)
    assert prompts == again
    assert np.array_equal(pictures, drawn_again)
    assert pictures.shape == (40, 32, 32, 3)
    assert not np.array_equal(pictures, draw_many((3, 2), 40)[1])


def test_training_never_sees_a_held_out_combination() -> None:
    random = np.random.default_rng(1)
    for prompt in (training_prompt(random) for _ in range(20_000)):
        assert prompt.word not in HELD_WORDS
        assert not HELD_COLOURS & {(thing.colour, thing.shape) for thing in prompt.things}
        if prompt.relation is None and prompt.things:
            assert (len(prompt.things), prompt.things[0].shape) not in HELD_COUNTS
        if prompt.relation is not None:
            first, second = (thing.shape for thing in prompt.things)
            assert (
                prompt.relation not in ("left of", "right of")
                or {
                    "left of": (first, second),
                    "right of": (second, first),
                }[prompt.relation]
                not in HELD_BESIDE
            )
            assert (
                prompt.relation not in ("above", "below")
                or {
                    "above": (first, second),
                    "below": (second, first),
                }[prompt.relation]
                not in HELD_STACKED
            )


def test_training_sees_each_part_of_what_is_held_out() -> None:
    random = np.random.default_rng(2)
    seen = [training_prompt(random) for _ in range(5_000)]
    things = {(thing.colour, thing.shape) for prompt in seen for thing in prompt.things}
    assert things == {(colour, shape) for colour in COLOURS for shape in SHAPES} - HELD_COLOURS
    for place in range(3):
        assert {prompt.word[place] for prompt in seen if prompt.word} == set(string.ascii_lowercase)
    for shape in SHAPES:
        counted = {len(p.things) for p in seen if p.skill == "count" and p.things[0].shape == shape}
        assert counted == {2, 3, 4} - {number for number, of in HELD_COUNTS if of == shape}


def test_what_is_held_out_is_held_out_however_it_is_said() -> None:
    left, right = next(iter(HELD_BESIDE))
    first, second = Thing(colour="green", shape=left), Thing(colour="orange", shape=right)
    assert placed(first, "left of", second).is_held_out
    assert placed(second, "right of", first).is_held_out


@pytest.mark.parametrize("skill", SKILLS)
def test_a_test_asks_only_for_what_is_held_out(skill: str) -> None:
    prompts = [prompt for prompt in asked(30) if prompt.skill == skill]
    assert len(prompts) == 30
    assert all(prompt.is_held_out for prompt in prompts)
    assert not any(prompt.is_held_out for prompt in asked(30, heldout=False))


def test_a_test_of_counts_and_positions_uses_colours_that_training_has_seen() -> None:
    random = np.random.default_rng(3)
    prompts = heldout_prompts(random, "count", 40) + heldout_prompts(random, "position", 40)
    assert not HELD_COLOURS & {(thing.colour, thing.shape) for prompt in prompts for thing in prompt.things}


def test_every_word_is_drawn_whole_in_every_font() -> None:
    random = np.random.default_rng(8)
    for word in ("mmm", "www", "jjj", "lgj", "dqp", *HELD_WORDS):
        ink = {lettering(word, font)[0].shape for font in FONTS}
        assert max(columns for _, columns in ink) <= 32
        for _ in range(3):
            away = np.abs(draw(spelt(word, "black", "yellow"), random)[..., 0].astype(int) - 250) > 60
            rows, columns = np.flatnonzero(away.any(1)), np.flatnonzero(away.any(0))
            assert rows[0] > 0, "a letter that is cut off would touch the edge"
            assert rows[-1] < 31
            assert columns[-1] - columns[0] > 18


@pytest.mark.parametrize("skill", SKILLS)
def test_the_judge_accepts_right_pictures_and_refuses_those_wrong_in_one_point(skill: str) -> None:
    random = np.random.default_rng(4)
    prompts = [prompt for prompt in asked(20) if prompt.skill == skill]
    accepted = [judge(prompt, draw(prompt, random)).right for prompt in prompts]
    fooled = [judge(prompt, draw(almost(random, prompt), random)).right for prompt in prompts]
    assert sum(accepted) >= 19
    assert sum(fooled) <= 1


def test_the_judge_refuses_a_word_in_another_colour_and_a_thing_too_many() -> None:
    random = np.random.default_rng(5)
    assert not judge(spelt("cat", "white", "blue"), draw(spelt("cat", "white", "red"), random)).right
    assert not judge(spelt("cat", "white", "blue"), draw(spelt("cat", "yellow", "blue"), random)).right
    one, other = Thing(colour="red", shape="ring"), Thing(colour="blue", shape="cross")
    assert not judge(coloured(one), draw(placed(one, "above", other), random)).right


@pytest.mark.parametrize("prompt", [asked(1)[place] for place in range(len(SKILLS))], ids=SKILLS)
def test_the_judge_refuses_noise_and_nothing(prompt: Prompt) -> None:
    random = np.random.default_rng(6)
    assert not judge(prompt, random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).right
    assert not judge(prompt, np.full((32, 32, 3), 128, dtype=np.uint8)).right


def test_the_judge_bears_the_faults_of_a_drawing_that_is_right() -> None:
    random = np.random.default_rng(7)
    prompts = asked(10)
    right = 0
    for prompt in prompts:
        noisy = draw(prompt, random) + random.normal(0, 8, (32, 32, 3))
        right += judge(prompt, np.clip(noisy, 0, 255).astype(np.uint8)).right
    assert right >= 0.95 * len(prompts)


def _trained(recipe: Recipe, path: Path | None) -> Training:
    return run(recipe, path, after_chunk=lambda _training, _loss: None, chunks_a_save=1)


def _trained_for_one_chunk(recipe: Recipe, path: Path) -> None:
    training = Training(recipe)
    with ThreadPoolExecutor(recipe.threads) as pool:
        training.chunk(pool)
    training.save(path)


def test_training_that_was_broken_off_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = replace(TINY, steps=3 * CHUNK_STEPS, warmup=CHUNK_STEPS, fall=0.5)
    whole = _trained(recipe, None)
    # The rate does not fall in the first chunk of either, so what comes of it is the same.
    _trained_for_one_chunk(replace(recipe, steps=4 * CHUNK_STEPS), tmp_path / "state.pt")
    resumed = _trained(recipe, tmp_path / "state.pt")
    assert resumed.samples == whole.samples == 3 * CHUNK_STEPS * recipe.batch
    for name, values in whole.averaged().items():
        np.testing.assert_array_equal(resumed.averaged()[name], values)


def test_training_does_not_go_on_from_a_run_with_another_recipe(tmp_path: Path) -> None:
    _trained_for_one_chunk(TINY, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="another run"):
        _trained(replace(TINY, lr=1e-4), tmp_path / "state.pt")


def test_a_checkpoint_is_scored_on_every_skill() -> None:
    found = score(loaded(TINY, Training(TINY).averaged()), asked(2))
    assert set(found.by_skill) == set(SKILLS)
    assert found.overall == 0.0, "a model that has learnt nothing draws noise"


def test_the_folder_of_pictures_is_one_that_data_prepare_reads(tmp_path: Path) -> None:
    write_folder(tmp_path, 5, 12)
    items = list(items_of(tmp_path, None))
    assert len(items) == 12
    assert [item.caption for item in items] == [prompt.caption for prompt in draw_many((5,), 12)[0]]


def test_a_quick_run_ends_well_and_writes_nothing() -> None:
    results = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "skills.json"
    before = results.read_bytes() if results.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.skills", "--quick"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout
    assert (results.read_bytes() if results.exists() else None) == before
