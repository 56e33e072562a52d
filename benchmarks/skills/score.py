"""How many of a model's pictures are right, skill by skill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from benchmarks.skills.judge import Verdict, judge_all
from benchmarks.skills.pictures import draw
from benchmarks.skills.prompts import SKILLS, Prompt, almost, heldout_prompts, training_prompt
from benchmarks.skills.training import SPACE, Recipe
from commonweight.drawing import Drawing
from commonweight.drawing import draw as draw_captions
from diloco.tables import Floats
from mmdit.export import Loaded
from mmdit.sample import Guidance
from mmdit.space import ByteImages
from mmdit.transformer import build

PROMPT_SEED: Final = 20_261_127
DRAWING: Final = Drawing(seed=1, steps=24, guidance=Guidance(scale=2.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Prompts, pictures and verdicts; `by_skill` is each skill's share of right pictures."""

    prompts: Sequence[Prompt] = field(repr=False)
    pictures: ByteImages = field(repr=False)
    verdicts: Sequence[Verdict] = field(repr=False)

    @property
    def by_skill(self) -> Mapping[str, float]:
        """Share of each skill's pictures that are right."""
        right = {
            skill: [v.right for p, v in zip(self.prompts, self.verdicts, strict=True) if p.skill == skill]
            for skill in SKILLS
        }
        return {skill: sum(found) / len(found) for skill, found in right.items()}

    @property
    def overall(self) -> float:
        """The mean over the skills, each counting as much as any other, as GenEval has it (arXiv 2310.11513)."""
        shares = self.by_skill.values()
        return sum(shares) / len(shares)


def asked(count: int, *, heldout: bool = True) -> list[Prompt]:
    """Return `count` prompts of each skill: of held-out combinations, or of such as training sees."""
    random = np.random.default_rng((PROMPT_SEED, int(heldout)))
    if heldout:
        return [prompt for skill in SKILLS for prompt in heldout_prompts(random, skill, count)]
    return [training_prompt(random, skill) for skill in SKILLS for _ in range(count)]


def loaded(recipe: Recipe, weights: Mapping[str, Floats]) -> Loaded:
    """Return weights as a checkpoint to draw with."""
    return Loaded(
        model=build(recipe.model, weights, device="cpu").eval(),
        config=recipe.model,
        conditioning=recipe.conditioning,
        space=SPACE,
        shift=recipe.shift,
    )


def score(checkpoint: Loaded, prompts: Sequence[Prompt], drawing: Drawing = DRAWING) -> Score:
    """Draw each prompt once and judge it."""
    pictures = draw_captions(checkpoint, [prompt.caption for prompt in prompts], drawing)
    return Score(prompts=prompts, pictures=pictures, verdicts=judge_all(prompts, pictures))


def score_drawn(prompts: Sequence[Prompt], shown: Sequence[Prompt]) -> Score:
    """Judge pictures that the generator itself has drawn of other prompts, or of the same ones."""
    random = np.random.default_rng((PROMPT_SEED, 2))
    pictures = np.stack([draw(prompt, random) for prompt in shown])
    return Score(prompts=prompts, pictures=pictures, verdicts=judge_all(prompts, pictures))


def score_almost(prompts: Sequence[Prompt]) -> Score:
    """Judge pictures each of which is wrong in one point."""
    random = np.random.default_rng((PROMPT_SEED, 3))
    return score_drawn(prompts, [almost(random, prompt) for prompt in prompts])
