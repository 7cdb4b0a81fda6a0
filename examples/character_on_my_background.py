"""A character with fixed attributes, each user's background behind it.

What is fixed stands in the prompt, in the words the base model was trained with; what the prompt leaves open,
here the background, comes from the profile. One row for the base model and one for each profile, all from the
same noise. The paper shows such pictures (character design, Figure 4) and does not say how; the words and the
strength are ours: too strong a user overrules the words.

    python examples/character_on_my_background.py --profile ann.safetensors --profile bo.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping

from PIL.Image import Image

from common import example_parser, open_pipeline, open_profiles, run, save_grid
from prefgen.pipeline import PrefGenPipeline
from prefgen.profile import UserProfile

FIXED = ("golden", "ink outline", "centered", "clean edges")
"""A value of every attribute group of the mini world but the background."""


def draw(
    pipeline: PrefGenPipeline,
    profiles: Mapping[str, UserProfile],
    *,
    prompt: str,
    user_scale: float,
    num_images: int,
    seed: int,
    steps: int,
) -> dict[str, list[Image]]:
    """Label -> images, from the same noise row by row.

    Args:
        pipeline: the models.
        profiles: name -> whose background.
        prompt: the character and what is fixed about it.
        user_scale: strength of the user.
        num_images: columns.
        seed: of the first.
        steps: denoising steps.
    """
    same = {"num_images": num_images, "seed": seed, "num_steps": steps}
    anybody = next(iter(profiles.values()))
    rows = {"base model": pipeline.generate(prompt, profile=anybody, user_scale=0.0, **same)}
    for name, profile in profiles.items():
        rows[name] = pipeline.generate(prompt, profile=profile, user_scale=user_scale, **same)
    return rows


def main() -> None:
    """Read the options, draw, write the grid."""
    parser = example_parser(
        "A character with fixed attributes, each user's background behind it.",
        prompt="a robot",
        out="work/examples/character_on_my_background.png",
        user_scale=0.6,
    )
    fixed = ", ".join(FIXED)
    parser.add_argument("--fixed", default=fixed, help=f"attributes that nobody's taste may change ({fixed})")
    args = parser.parse_args()
    pipeline = open_pipeline(args)
    profiles = open_profiles(args, pipeline=pipeline)
    prompt = f"{args.prompt}, {args.fixed}" if args.fixed else args.prompt
    rows = draw(
        pipeline,
        profiles,
        prompt=prompt,
        user_scale=args.user_scale,
        num_images=args.num_images,
        seed=args.seed,
        steps=args.steps,
    )
    save_grid(rows, title=prompt, path=args.out)


if __name__ == "__main__":
    raise SystemExit(run(main))
