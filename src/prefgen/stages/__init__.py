"""The four stages, by name. Import paths only: listing stages must not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """Where a stage's three classes live, each as ``package.module:ClassName``.

    Attributes:
        config: dataclass derived from ``prefgen.config.StageConfig``; its module never imports torch.
        data: LightningDataModule built as ``XData(config)``.
        module: ``prefgen.stages.base.StageModule`` built as ``XModule(config)``.
    """

    config: str
    data: str
    module: str


def _entry(stage: str, class_prefix: str) -> StageEntry:
    folder = f"prefgen.stages.{stage}"
    return StageEntry(
        config=f"{folder}.config:{class_prefix}Config",
        data=f"{folder}.data:{class_prefix}Data",
        module=f"{folder}.module:{class_prefix}Module",
    )


STAGES: dict[str, StageEntry] = {
    "vqa": _entry("vqa", "VQA"),
    "probe": _entry("probe", "Probe"),
    "align": _entry("align", "Align"),
    "inject": _entry("inject", "Inject"),
}
