"""Copy what four stages trained in a work folder to where an installed prefgen looks for it.

    python tools/ship_artefacts.py work/demo src/prefgen/assets/mini

The artefacts belong to the foundation in the same folder: their lineage is checked before anything is copied.
A card, ``cards/artefacts.json``, says from which run they come and what its report measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from prefgen.artefacts import Artefacts
from prefgen.errors import CheckpointError, PrefgenError
from prefgen.lineage import hash_folder
from prefgen.models.projector import load_projector
from prefgen.models.text_lora import TEXT_LORA_FILE

FIGURES = ("vqa_accuracy", "history_blind", "own_vs_base", "own_vs_other", "own_vs_image_only")
"""What the card repeats of the report."""


def ship(work: Path, *, out: Path) -> dict[str, Any]:
    """Copy LoRA, probe, projector, readout, adapter, and any calibration and text LoRA; write the card.

    Raises:
        CheckpointError: a part is missing, or belongs to another MLLM than the one in ``out``.
    """
    parts = Artefacts.find(work, pipeline=out / "pipeline", mllm=str(out / "mllm"))
    parts.require("lora", "probe", "projector", "attribute_readout", "user_adapter")
    made_by, here = load_projector(parts.projector).lineage.get("mllm"), hash_folder(out / "mllm")
    if made_by != here:
        raise CheckpointError(
            f"{parts.projector} belongs to another MLLM than {out / 'mllm'}; run the demo again"
        )
    sizes = {}
    optional = (
        (parts.calibration, "calibration.json"),
        (parts.user_adapter.with_name(TEXT_LORA_FILE), TEXT_LORA_FILE),
    )
    for _, name in optional:
        (out / name).unlink(missing_ok=True)  # of older artefacts
    for source, name in (
        *((source, name) for source, name in optional if source.is_file()),
        (parts.lora, "lora"),
        (parts.probe, "probe.json"),
        (parts.projector, "projector.safetensors"),
        (parts.attribute_readout, "attribute_readout.safetensors"),
        (parts.user_adapter, "user_adapter.safetensors"),
    ):
        target = out / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        sizes[name] = sum(f.stat().st_size for f in ([target] if target.is_file() else target.rglob("*")))
    report = work / "report" / "metrics.json"
    metrics = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    card = {
        "part": "artefacts",
        "made_by": "make demo",
        "bytes": sizes,
        "stages": metrics.get("stages", {}),
        "figures": {name: metrics[name] for name in FIGURES if name in metrics},
    }
    (out / "cards").mkdir(parents=True, exist_ok=True)
    (out / "cards" / "artefacts.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return card


def main() -> int:
    """Parse and copy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="the work folder, e.g. work/demo")
    parser.add_argument("out", type=Path, help="the assets folder, e.g. src/prefgen/assets/mini")
    args = parser.parse_args()
    try:
        card = ship(args.work, out=args.out)
    except PrefgenError as error:
        print(f"ship_artefacts: error: {error}", file=sys.stderr)
        return 2
    for name, size in card["bytes"].items():
        print(f"{name}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
