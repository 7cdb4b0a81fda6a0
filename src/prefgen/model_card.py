"""The card beside an exported adapter: what it was trained on and with, as far as the run folder tells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from prefgen import __version__
from prefgen.artefacts import Artefacts
from prefgen.data.index import ShardIndex, read_index
from prefgen.errors import DataError

_SETTINGS = (
    "seed",
    "trainer.max_steps",
    "trainer.precision",
    "data.batch_size",
    "optim.learning_rate",
    "optim.ema_decay",
    "inject.user_drop_rate",
    "inject.text_drop_rate",
    "inject.both_drop_rate",
    "inject.part_drop_rate",
    "inject.min_snr_gamma",
)
"""Keys of the run's configuration that the card shows, in this order."""

_USE = """\
## Use without prefgen

`draw.py` in this folder needs torch, diffusers and safetensors:

```
python draw.py --pipeline PIPELINE --profile me.safetensors --prompt "a red fox" --out fox.png
```

The same by hand, with an `.embeds.safetensors` made by `prefgen export --profile`:

```python
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

pipe = DiffusionPipeline.from_pretrained(PIPELINE)
pipe.load_ip_adapter(FOLDER, subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
pipe.set_ip_adapter_scale(0.8)
embeds = load_file("me.embeds.safetensors")["ip_adapter_image_embeds"]
image = pipe("a red fox", ip_adapter_image_embeds=[embeds]).images[0]
```

The first row of the embeds is the user of whom nothing is known, for classifier-free guidance; without
guidance pass `embeds[1:]`. A stock pipeline draws one user a call. `ip_adapter_image` does not work: the
adapter reads a profile, not a picture. A `text_lora.safetensors` in this folder was trained along:
load it too, with `pipe.load_lora_weights`.
"""

_LIMITS = """\
## Limits

- The adapter fits the base model named above and no other; a profile fits if the same models made it.
- It was trained on the users counted above. Nothing is known of its use for other kinds of images or people.
- A profile describes one person's taste: treat it as personal data.
- The licence of the base model and of the training images holds for what is made with them.
"""


def write_card(
    path: Path,
    *,
    artefacts: Artefacts,
    header: Mapping[str, Any],
    num_parameters: int,
    files: Mapping[str, str],
) -> None:
    """Write the card.

    Args:
        path: the markdown file.
        artefacts: where the adapter lies, with its run's ``config.yaml`` and ``metrics.json`` beside it.
        header: of ``user_adapter.safetensors``.
        num_parameters: numbers in the adapter.
        files: name -> sha256 of what was exported.
    """
    config = _read_config(artefacts.user_adapter.with_name("config.yaml"))
    base = Path(str(_key(config, "model.pipeline") or artefacts.pipeline)).name
    lines = [
        "---",
        "library_name: diffusers",
        f"base_model: {base}",
        "tags: [ip-adapter, personalization, prefgen]",
        "---",
        "",
        "# A user adapter in IP-Adapter format",
        "",
        f"Made by prefgen {__version__}, stage inject. It lets the frozen diffusion model `{base}` follow",
        "one person's taste, which it reads from a profile.",
        "",
        f"- parameters: {num_parameters:,} in {len(header['layers'])} cross-attentions and one projection",
        f"- reads: {', '.join(header['shape']['parts'])} (four tokens each)",
        "",
        *_training(artefacts, config=config),
        *_measured(artefacts.user_adapter.with_name("metrics.json")),
        *_lineage(header["lineage"], files=files),
    ]
    path.write_text("\n".join(lines) + "\n" + _USE + "\n" + _LIMITS, encoding="utf-8")


def _training(artefacts: Artefacts, *, config: Mapping[str, Any]) -> Iterator[str]:
    yield "## Trained on"
    yield ""
    shards = _key(config, "data.shards")
    index = _index(Path(str(shards))) if shards else None
    if index is None:
        yield "The histories were not at hand when this was exported."
    else:
        for split in index.splits:
            counts = index.counts(split)
            yield (
                f"- {split}: {counts.users:,} users, {counts.liked:,} liked and {counts.disliked:,} disliked "
                "images" + (", never trained on" if split != "train" else "")
            )
        yield from _source(Path(str(shards)).parent / "raw" / "import.json")
    yield ""
    if not config:
        yield f"No config.yaml lay beside {artefacts.user_adapter.name}, so the settings are not known."
    else:
        yield "| setting | value |"
        yield "|---|---|"
        for name in _SETTINGS:
            value = _key(config, name)
            if value is not None:
                yield f"| {name} | {value} |"
        if start := _key(config, "model.init_adapter"):
            yield f"| started from | {Path(str(start)).name} |"
    yield ""


def _source(report: Path) -> Iterator[str]:
    found = _read_json(report)
    for name in ("source", "licence"):
        if isinstance(found.get(name), str):
            yield f"- {name} of the histories: {found[name]}"


def _measured(path: Path) -> Iterator[str]:
    figures = _read_json(path)
    rows = {
        name: [figures.get(when, {}).get(name) for when in ("before", "fit", "test")]
        for when in ("before", "fit", "test")
        for name in figures.get(when, {})
        if not name.startswith("train/")
    }
    if not rows:
        return
    yield "## Measured"
    yield ""
    yield (
        "Noise loss on users never trained on: for the own user, for another one (`_other`) and for nobody "
        "(`_base`)."
    )
    yield ""
    yield "| figure | before training | after | test |"
    yield "|---|---|---|---|"
    for name, values in sorted(rows.items()):
        yield f"| {name} | " + " | ".join("" if v is None else f"{v:.5g}" for v in values) + " |"
    yield ""


def _lineage(lineage: Mapping[str, str], *, files: Mapping[str, str]) -> Iterator[str]:
    yield "## Files and models"
    yield ""
    yield "| what | sha256 |"
    yield "|---|---|"
    for name, value in {**files, **dict(sorted(lineage.items()))}.items():
        yield f"| {name} | {value} |"
    yield ""


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for word in name.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value


def _index(path: Path) -> ShardIndex | None:
    try:
        return read_index(path)
    except DataError:
        return None
