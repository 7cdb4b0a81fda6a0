"""Training steps a second of stage inject: the framework against a plain loop over the same modules.

    python tools/bench_inject.py --steps 20 --rounds 1                          # tiny models: does it run
    python tools/bench_inject.py --workdir work/demo --json inject.json         # the mini preset
    python tools/bench_inject.py --workdir work/demo data.batch_size=8

Both ways build the same module and loader from one configuration and do the same work a step: batch, noise
loss, backward, clipping, AdamW, schedule. The framework does what else a run does: Lightning's loop,
callbacks, logging, checkpoints at their interval. The first steps of each way are thrown away; they
alternate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from lightning.pytorch import Callback

from prefgen.config import load_config
from prefgen.run import fit
from prefgen.run_noise import quiet_lightning
from prefgen.stages.inject.config import InjectConfig
from prefgen.stages.inject.data import InjectData
from prefgen.stages.inject.module import InjectModule

LIMIT = 0.97
"""Least share of the plain loop's rate that the framework must reach."""


def save_tiny_workdir(folder: Path) -> list[str]:
    """Everything stage inject reads, tiny; the overrides that name it."""
    from prefgen.models.projector import ProjectorShape, SemProjector, save_projector
    from prefgen.testing.data import make_embeddings, make_shards
    from prefgen.testing.diffusion import TINY_IMAGE_DIM, TINY_TEXT_DIM, save_tiny_pipeline

    make_shards(folder, num_users=64, num_liked=8, num_disliked=6)
    widths = {"core_dim": 10, "sem_dim": 6, "image_dim": TINY_IMAGE_DIM}
    make_embeddings(folder / "embeddings", num_users=64, num_images=8, **widths)
    save_tiny_pipeline(folder / "pipeline")
    projector = SemProjector(ProjectorShape(sem_width=6, text_width=TINY_TEXT_DIM, hidden_width=8))
    save_projector(projector, path=folder / "align" / "projector.safetensors", lineage={}, text={})
    tiny = [
        "model.init_adapter=null",  # the preset's was made for the mini pipeline
        "trainer.log_every_n_steps=4",
        "model.frozen_dtype=float32",
        "model.vae_dtype=float32",
        "trainer.precision=32-true",
    ]
    return [f"workdir={folder}", f"model.pipeline={folder / 'pipeline'}", "data.batch_size=8", *tiny]


class Clock(Callback):
    """Seconds between the end of the warm-up and the last step."""

    def __init__(self, *, warmup: int) -> None:
        self._warmup = warmup
        self._began = 0.0
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Start, and stop at the latest step."""
        if trainer.global_step == self._warmup:
            self._began = time.perf_counter()
        self.seconds = time.perf_counter() - self._began


def framework_rate(config: InjectConfig, *, warmup: int) -> float:
    """Steps a second through ``prefgen fit``."""
    clock = Clock(warmup=warmup)
    with quiet_lightning():
        fit(
            config,
            make_module=lambda: InjectModule(config),
            make_data=lambda: InjectData(config),
            extra_callbacks=(clock,),
        )
    return (config.trainer.max_steps - warmup) / clock.seconds


def plain_rate(config: InjectConfig, *, warmup: int) -> float:
    """Steps a second of the plain loop."""
    torch.manual_seed(config.seed)
    module = InjectModule(config)
    module.log = lambda *_, **__: None
    device = "cuda" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    module.to(device)
    data = InjectData(config, image_size=module.bundle.image_size)
    rows = data.statistics()
    parts = module._parts(**{name: value.to(device) for name, value in rows.items()})
    module.adapter.fusion.standardise(parts)
    total = config.trainer.max_steps
    trained = module.trained_parameters()
    optimizer = torch.optim.AdamW(
        trained, lr=config.optim.learning_rate, weight_decay=config.optim.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    mixed = config.trainer.precision == "bf16-mixed"
    loader = data.train_dataloader()
    step, began = 0, 0.0
    while step < total:
        for batch in loader:
            if step == warmup:
                began = time.perf_counter()
            with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
                loss = module.training_step(_to(batch, device=device))
            optimizer.zero_grad()
            loss.backward()
            if config.trainer.gradient_clip_val is not None:
                torch.nn.utils.clip_grad_norm_(trained, config.trainer.gradient_clip_val)
            optimizer.step()
            schedule.step()
            step += 1
            if step == total:
                break
    return (total - warmup) / (time.perf_counter() - began)


def _to(batch: Any, *, device: str) -> Any:
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in batch]
    return type(batch)(*moved)


def main() -> None:
    """Read the command line and run."""
    text = __doc__ or ""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="folder in which probe and align were fitted (tiny random models)")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--steps", type=int, default=120, help="measured steps a round")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every rate here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"plain loop": [], "prefgen fit": []}
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        where = [f"workdir={args.workdir}"] if args.workdir else save_tiny_workdir(scratch / "tiny")
        steps = args.warmup + args.steps
        settings = [
            *where,
            f"trainer.max_steps={steps}",
            "trainer.limit_val_batches=0",
            "optim.ema_decay=null",
        ]
        settings += ["trainer.validate_before_fit=false", "inject.sample_every_n_steps=0", *args.overrides]
        for number in range(args.rounds):
            config = cast(InjectConfig, load_config("inject", preset=args.preset, overrides=settings))
            config = replace(config, run_dir=str(scratch / f"run{number}"))
            rates["plain loop"].append(plain_rate(config, warmup=args.warmup))
            rates["prefgen fit"].append(framework_rate(config, warmup=args.warmup))
    print(f"{args.steps} steps a round after {args.warmup}, {torch.get_num_threads()} threads")
    for name, values in rates.items():
        print(f"  {name:<12}{median(values):>9.3f} steps/s   ({', '.join(f'{v:.3f}' for v in values)})")
    share = median(rates["prefgen fit"]) / median(rates["plain loop"])
    print(f"  share {share:.3f} (at least {LIMIT}: {'holds' if share >= LIMIT else 'FAILS'})")
    if args.json is not None:
        args.json.write_text(json.dumps({"rates": rates, "share": share}, indent=2) + "\n")
        print(f"every rate is in {args.json}")


if __name__ == "__main__":
    main()
