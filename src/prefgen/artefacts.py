"""Where the trained parts lie: in a work folder of the four stages, or flat as prefgen ships them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from prefgen.errors import CheckpointError

MINI_ASSETS = Path(__file__).resolve().parent / "assets" / "mini"
"""What ships with prefgen: the foundation, and artefacts trained on it."""


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """Where everything lies.

    Attributes:
        mllm: folder or hub id of the MLLM.
        lora: stage vqa's LoRA folder.
        calibration: of its probability of Yes, by 'prefgen test --stage vqa'; need not be there.
        probe: stage probe's ``probe.json``.
        pipeline: the diffusers pipeline folder, with an image encoder in it.
        projector: stage align's file.
        attribute_readout: stage align's other file: words read linearly from a profile that holds none.
        user_adapter: stage inject's file.
    """

    mllm: str
    lora: Path
    calibration: Path
    probe: Path
    pipeline: Path
    projector: Path
    attribute_readout: Path
    user_adapter: Path

    @staticmethod
    def find(
        folder: Path | None = None,
        *,
        pipeline: Path | None = None,
        mllm: str | None = None,
        adapter: Path | None = None,
    ) -> Artefacts:
        """Names in a work folder of the four stages, or in a flat folder like the shipped one.

        Args:
            folder: a workdir (``vqa/lora``, ``probe/probe.json``, ``align/..``, ``inject/..``) or a folder
                that holds ``lora/``, ``calibration.json``, ``probe.json``, ``projector.safetensors``,
                ``attribute_readout.safetensors`` and ``user_adapter.safetensors``; None for what ships with
                prefgen.
            pipeline: the pipeline they were trained with; None for the shipped mini one.
            mllm: the MLLM they were trained with; None for the folder's own ``mllm/`` (as 'make smol' builds
                it), or else the shipped mini one.
            adapter: an adapter file instead of the folder's; see ``models.ip_adapter.read_adapter``.

        Raises:
            CheckpointError: no such folder.
        """
        root = MINI_ASSETS if folder is None else folder
        if not root.is_dir():
            raise CheckpointError(
                f"no artefacts at {root}; give a work folder in which all stages were fitted"
            )
        staged = any((root / stage).is_dir() for stage in ("vqa", "probe", "align", "inject"))
        parts = ("vqa", "probe", "align", "inject") if staged else ("", "", "", "")
        own = root / "mllm"
        return Artefacts(
            mllm=str(own if own.is_dir() else MINI_ASSETS / "mllm") if mllm is None else mllm,
            lora=root / parts[0] / "lora",
            calibration=root / parts[0] / "calibration.json",
            probe=root / parts[1] / "probe.json",
            pipeline=MINI_ASSETS / "pipeline" if pipeline is None else pipeline,
            projector=root / parts[2] / "projector.safetensors",
            attribute_readout=root / parts[2] / "attribute_readout.safetensors",
            user_adapter=root / parts[3] / "user_adapter.safetensors" if adapter is None else adapter,
        )

    def require(self, *names: str) -> None:
        """Refuse to go on without some of them, before anything heavy is read.

        Raises:
            CheckpointError: naming what is missing and how it is made.
        """
        made_by = {
            "lora": "prefgen fit --stage vqa",
            "probe": "prefgen fit --stage probe",
            "projector": "prefgen fit --stage align",
            "attribute_readout": "prefgen fit --stage align",
            "user_adapter": "prefgen fit --stage inject",
            "pipeline": "make foundation",
        }
        for name in names:
            path = Path(getattr(self, name))
            if not path.exists():
                raise CheckpointError(
                    f"no {name.replace('_', ' ')} at {path}; make it with '{made_by[name]}', "
                    "or name the folder that holds the trained artefacts"
                )

    def as_text(self) -> dict[str, str]:
        """Field -> path, for a record beside images."""
        return {item.name: str(getattr(self, item.name)) for item in fields(self)}
