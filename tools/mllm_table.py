"""Print the table of published MLLMs, built without weights: sizes, LoRA targets, trainable parameters."""

from __future__ import annotations

import argparse

from prefgen.models.real_sizes import measure, published_models


def main() -> None:
    """One line a model; exit code 1 if a count is not the published one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA (default 8)")
    parser.add_argument("--only", default="", help="models whose name or family contains this")
    options = parser.parse_args()
    wrong = 0
    print(
        "| model | family | parameters | as published | layers x width | image -> tokens | LoRA | trainable |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in published_models():
        if options.only not in f"{model.name} {model.family}":
            continue
        one = measure(model, rank=options.rank)
        same = one.parameters == one.published
        wrong += one.published is not None and not same
        published = "yes" if same else "no exact count found"
        if one.published is not None and not same:
            published = f"NO: {one.published:,}"
        print(
            f"| {one.name} | {one.family} | {one.parameters:,} | {published} "
            f"| {one.num_layers} x {one.hidden_size} | {one.image_side} px -> {one.tokens_per_image} "
            f"| {one.lora_modules} in {one.lora_path} | {one.trainable:,} |",
            flush=True,
        )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
