"""Every configs/*/*.yaml on paper: does it load, and what align and inject would train, hold and write.

    python tools/preset_table.py
    python tools/preset_table.py --preset sdxl --sem-width 16384 --core-width 4096

Networks are built on the meta device from published configurations, so no weight is read. Memory is that of
weights, gradients, AdamW's two means and the moving average on one GPU, without activations: those depend on
batch, image size and checkpointing. Widths of sem and core are the MLLM's, which these presets leave open.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefgen.config import PRESETS, StageConfig, configs_folder, load_config
from prefgen.errors import PrefgenError
from prefgen.models.fusion import FusionShape
from prefgen.models.projector import ProjectorShape, SemProjector
from prefgen.models.user_adapter import UserAdapter
from prefgen.stages import STAGES
from prefgen.stages.align.config import AlignConfig
from prefgen.stages.inject.config import InjectConfig
from prefgen.testing.published import SD15, SDXL, Published, meta_parts

MODELS = {"sd15": SD15, "sdxl": SDXL}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED = 4 + 4 + 8
"""Bytes a trained number takes: float32 weight, gradient, two means."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; numbers of parameters and bytes, None where they are not known."""

    name: str
    state: str
    trained: int | None = None
    frozen: int | None = None
    memory: int | None = None
    artefact: int | None = None

    def __str__(self) -> str:
        numbers = [f"{n / 1e6:,.1f} M" if n is not None else "-" for n in (self.trained, self.frozen)]
        sizes = [f"{n / 1e9:,.2f} GB" if n is not None else "-" for n in (self.memory, self.artefact)]
        return f"{self.name:<32}{self.state:<10}" + "".join(f"{text:>14}" for text in (*numbers, *sizes))


def count(module: torch.nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def align_row(config: AlignConfig, *, name: str, model: Published, sem_width: int) -> Row:
    """The projector, and the text encoder it is trained against."""
    which = 1 if config.model.text_encoder == "text_encoder_2" else 0
    text = meta_parts(model)[f"text_encoder{'_2' if which else ''}"]
    width = int(model.texts[which]["projection_dim" if which else "hidden_size"])
    shape = ProjectorShape(sem_width=sem_width, text_width=width, hidden_width=config.model.hidden_width)
    with torch.device("meta"):
        trained = count(SemProjector(shape))
    frozen = count(text)
    memory = trained * TRAINED + frozen * BYTES[config.model.frozen_dtype]
    return Row(name=name, state="loads", trained=trained, frozen=frozen, memory=memory, artefact=4 * trained)


def inject_row(config: InjectConfig, *, name: str, model: Published, core_width: int) -> Row:
    """The adapter, and the pipeline it is trained in."""
    parts = meta_parts(model)
    # SDXL's pooled text comes from the second encoder, and aligned embeddings with it.
    aligned = int(model.texts[-1]["projection_dim" if len(model.texts) > 1 else "hidden_size"])
    widths = {"aligned": aligned, "core": core_width, "image": model.image_width}
    names: Any = tuple(config.model.parts)
    shape = FusionShape(
        parts=names,
        widths=tuple(widths[part] for part in names),
        cross_width=int(model.unet["cross_attention_dim"]),
    )
    with torch.device("meta"):
        trained = count(UserAdapter(parts["unet"], shape=shape))
    frozen = {part: count(module) for part, module in parts.items()}
    ema = 4 if config.optim.ema_decay is not None else 0
    vae = frozen.pop("vae")
    memory = trained * (TRAINED + ema) + vae * BYTES[config.model.vae_dtype]
    memory += sum(frozen.values()) * BYTES[config.model.frozen_dtype]
    return Row(
        name=name,
        state="loads",
        trained=trained,
        frozen=vae + sum(frozen.values()),
        memory=memory,
        artefact=4 * trained,
    )


def rows(preset: str, *, sem_width: int, core_width: int) -> Iterator[Row]:
    """A row a file of the preset."""
    for path in sorted((configs_folder() / preset).glob("*.yaml")):
        stage = next((name for name in STAGES if path.stem.startswith(name)), None)
        name = f"{preset}/{path.name}"
        if stage is None:
            yield Row(name=name, state="no stage")
            continue
        config = dry_run(stage, path=path)
        model = MODELS.get(preset)
        if isinstance(config, str):
            yield Row(name=name, state=config)
        elif isinstance(config, InjectConfig) and model is not None:
            yield inject_row(config, name=name, model=model, core_width=core_width)
        elif isinstance(config, AlignConfig) and model is not None:
            yield align_row(config, name=name, model=model, sem_width=sem_width)
        else:
            yield Row(name=name, state="loads")


def dry_run(stage: str, *, path: Path) -> StageConfig | str:
    """The configuration, or what is wrong with it."""
    try:
        return load_config(stage, file=path)
    except PrefgenError as error:
        return f"REFUSED: {error}"


def main() -> None:
    """Read the command line and print."""
    text = __doc__ or ""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=PRESETS)
    parser.add_argument("--sem-width", type=int, default=4 * 4096, help="four layers of the MLLM (16384)")
    parser.add_argument("--core-width", type=int, default=4096, help="one layer of the MLLM (4096)")
    args = parser.parse_args()
    head = ("trained", "frozen", "memory", "artefact")
    print(f"{'file':<32}{'':<10}" + "".join(f"{word:>14}" for word in head))
    for preset in args.preset:
        for row in rows(preset, sem_width=args.sem_width, core_width=args.core_width):
            print(row)


if __name__ == "__main__":
    main()
