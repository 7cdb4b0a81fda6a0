"""A judge that trained nothing: reads subject and attributes from a picture, for evaluation alone.

It shares neither weights nor training pictures with any model it judges. Its own training set and accuracy,
on clean pictures and on their VAE round trip, stand in its card.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from prefgen.errors import CheckpointError
from prefgen.whole_file import whole_file

_WIDTHS = (32, 64, 128, 192)


class _Residual(nn.Module):
    def __init__(self, width_in: int, width_out: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width_out)
        self.second = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width_out)
        self.skip = nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.skip(x))


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Probabilities for B pictures.

    Attributes:
        groups: attribute group -> (B, values), rows sum to 1.
        subjects: (B, subjects), rows sum to 1.
    """

    groups: dict[str, Tensor]
    subjects: Tensor


class Judge(nn.Module):
    """A small residual network with one head per attribute group and one for the subject.

    Args:
        groups: attribute words by group.
        subjects: subject phrases, e.g. ``a red fox``.
    """

    def __init__(self, *, groups: dict[str, tuple[str, ...]], subjects: tuple[str, ...]) -> None:
        super().__init__()
        self.groups = {name: tuple(values) for name, values in groups.items()}
        self.subjects = tuple(subjects)
        widths = (3, *_WIDTHS)
        self.trunk = nn.Sequential(
            *(_Residual(a, b, stride=2) for a, b in zip(widths, widths[1:], strict=False))
        )
        # Place matters (composition, frames): the last map is flattened in coarse cells, not averaged away.
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.mix = nn.Sequential(nn.Linear(_WIDTHS[-1] * 16, 256), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(values)) for name, values in self.groups.items()}
        )
        self.subject_head = nn.Linear(256, len(self.subjects))

    def forward(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits of (B,3,H,W) pixels in [-1,1]: per group (B, values), and subjects (B, subjects)."""
        hidden = self.mix(self.pool(self.trunk(pixels)).flatten(1))
        return {name: head(hidden) for name, head in self.heads.items()}, self.subject_head(hidden)

    @torch.no_grad()
    def judge(self, pixels: Tensor, *, batch_size: int = 128) -> Judgement:
        """Probabilities for pixels (B,3,H,W) in [-1,1]; float32, in eval mode."""
        self.eval()
        parts = [self(pixels[start : start + batch_size]) for start in range(0, len(pixels), batch_size)]
        groups = {
            name: torch.cat([attributes[name] for attributes, _ in parts]).softmax(dim=-1)
            for name in self.groups
        }
        return Judgement(groups=groups, subjects=torch.cat([part for _, part in parts]).softmax(dim=-1))

    def save(self, path: Path) -> None:
        """Write fp16 weights, with the words in the header."""
        header = {"groups": json.dumps(self.groups), "subjects": json.dumps(self.subjects)}
        state = {
            name: value.half().contiguous() if value.is_floating_point() else value
            for name, value in self.state_dict().items()
        }
        with whole_file(path) as part:
            part.write_bytes(to_bytes(state, metadata=header))

    @staticmethod
    def load(path: Path) -> Judge:
        """Read a judge.

        Raises:
            CheckpointError: no such file, or not a judge.
        """
        if not path.is_file():
            raise CheckpointError(f"no judge at {path}; it comes with the foundation ('make foundation')")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        if not {"groups", "subjects"} <= set(header):
            raise CheckpointError(f"{path} is not a judge: its header names no groups and subjects")
        judge = Judge(groups=json.loads(header["groups"]), subjects=tuple(json.loads(header["subjects"])))
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval()


def utility(
    judgement: Judgement,
    *,
    groups: dict[str, tuple[str, ...]],
    liked: list[tuple[str, ...]],
    disliked: list[tuple[str, ...]],
    judged: frozenset[str],
) -> Tensor:
    """How much each picture shows of its user's taste: liked minus disliked probability.

    Args:
        judgement: of B pictures.
        groups: attribute words by group.
        liked: liked attributes of each picture's user.
        disliked: disliked ones.
        judged: attributes the judge reads reliably; the others are left out on both sides.

    Returns:
        (B,) sum over judged liked attributes of their probability, minus the same over disliked ones.
    """
    place = {word: (name, i) for name, words in groups.items() for i, word in enumerate(words)}
    scores = torch.zeros(len(liked))
    for row, (good, bad) in enumerate(zip(liked, disliked, strict=True)):
        for words, sign in ((good, 1.0), (bad, -1.0)):
            for word in words:
                if word in judged and word in place:
                    name, column = place[word]
                    scores[row] += sign * judgement.groups[name][row, column]
    return scores
