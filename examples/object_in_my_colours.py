"""An object in a user's colours: the prompt says what it is, the profile gives colour and surface.

Three rows from the same noise: the base model, the whole taste, and the taste held back from the shape. Held
back means that it works in late steps only, when the composition is settled, and in the UNet's way up, where
colour and surface are made; on the way down and in the middle, where the layout is made, it is multiplied by
--shape-scale.
The paper shows such pictures (product design, Figure 4) and does not say how; these dials are ours.

    python examples/object_in_my_colours.py --profile me.safetensors
"""

from __future__ import annotations

from PIL.Image import Image

from common import example_parser, open_pipeline, open_profiles, run, save_grid
from prefgen.models.user_schedule import UserSchedule
from prefgen.pipeline import PrefGenPipeline
from prefgen.profile import UserProfile


def draw(
    pipeline: PrefGenPipeline,
    profile: UserProfile,
    *,
    prompt: str,
    user_scale: float,
    user_from: float,
    shape_scale: float,
    num_images: int,
    seed: int,
    steps: int,
) -> dict[str, list[Image]]:
    """Label -> images, from the same noise row by row.

    Args:
        pipeline: the models.
        profile: whose colours.
        prompt: the object.
        user_scale: strength of the user.
        user_from: fraction of the steps after which the third row lets the taste work.
        shape_scale: factor on the strength in the way down and the middle, in the third row.
        num_images: columns.
        seed: of the first.
        steps: denoising steps.
    """
    same = {"profile": profile, "num_images": num_images, "seed": seed, "num_steps": steps}
    return {
        "base model": pipeline.generate(prompt, user_scale=0.0, **same),
        "the whole taste": pipeline.generate(prompt, user_scale=user_scale, **same),
        f"colours only: from {user_from:g} of the steps, shape x {shape_scale:g}": pipeline.generate(
            prompt,
            user_scale=user_scale,
            schedule=UserSchedule(start=user_from),
            block_scales={"down": shape_scale, "mid": shape_scale},
            **same,
        ),
    }


def main() -> None:
    """Read the options, draw, write the grid."""
    parser = example_parser(
        "An object in a user's colours.",
        prompt="a light bulb",
        out="work/examples/object_in_my_colours.png",
        user_scale=1.0,
    )
    parser.add_argument("--user-from", type=float, default=0.4, help="when the taste sets in (0.4)")
    parser.add_argument("--shape-scale", type=float, default=0.0, help="what of it forms the shape (0)")
    args = parser.parse_args()
    pipeline = open_pipeline(args)
    rows: dict[str, list[Image]] = {}
    for name, profile in open_profiles(args, pipeline=pipeline).items():
        found = draw(
            pipeline,
            profile,
            prompt=args.prompt,
            user_scale=args.user_scale,
            user_from=args.user_from,
            shape_scale=args.shape_scale,
            num_images=args.num_images,
            seed=args.seed,
            steps=args.steps,
        )
        # The base model's row is everybody's.
        rows |= {label if label == "base model" else f"{name}: {label}": row for label, row in found.items()}
    save_grid(rows, title=args.prompt, path=args.out)


if __name__ == "__main__":
    raise SystemExit(run(main))
