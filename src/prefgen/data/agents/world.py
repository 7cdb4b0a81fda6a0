"""The mini world: attribute groups, agents' tastes, how images follow from them, and the oracle's ceiling.

The numbers below were chosen by the oracle before anything was rendered (``tools/design_world.py`` prints its
table): a naive-Bayes reader of the true attributes must reach .92 to .97 with 8 + 8 images and at least .80
with 2 + 2, otherwise the task is either trivial or unlearnable. They are ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefgen.schema import Agent, Split

ATTRIBUTE_GROUPS: dict[str, tuple[str, ...]] = {
    "palette": (
        "crimson", "orange", "golden", "lime", "emerald", "teal",
        "sky blue", "navy", "violet", "pink", "brown", "gray",
    ),
    "rendering": (
        "ink outline", "flat shapes", "line art", "silhouette", "pixel art", "halftone",
        "hatching", "gradient fill", "neon glow", "sticker", "negative", "block shadow",
    ),
    "background": (
        "plain white", "plain black", "checkerboard", "polka dots", "stripes", "sunburst",
        "grid paper", "brick wall", "ocean waves", "grassy hill", "starry sky", "city skyline",
    ),
    "composition": (
        "centered", "tiny", "close-up", "upside down", "tilted", "top left",
        "bottom right", "twins", "four copies", "row of three", "tall", "wide",
    ),
    "finish": (
        "clean edges", "black frame", "polaroid", "letterbox", "vignette", "round crop",
        "stamp edge", "film strip", "dashed border", "sparkles", "corner ribbon", "soft focus",
    ),
}  # fmt: skip
"""Five groups of twelve values. Every image shows exactly one value of each group."""

GROUPS: tuple[str, ...] = tuple(ATTRIBUTE_GROUPS)
ATTRIBUTES: tuple[str, ...] = tuple(name for values in ATTRIBUTE_GROUPS.values() for name in values)
NUM_VALUES = 12
GROUP_OF: dict[str, str] = {name: group for group, values in ATTRIBUTE_GROUPS.items() for name in values}


@dataclass(frozen=True, kw_only=True)
class TasteModel:
    """How strongly and how widely an agent cares.

    Attributes:
        beta: sharpness; a value is drawn from softmax(+-beta * taste), taste in {-1, 0, 1}.
        min_cared_groups: fewest groups an agent cares about.
        max_cared_groups: most groups an agent cares about.
        num_liked: liked values in each cared-for group.
        num_disliked: disliked values in each cared-for group.
    """

    beta: float = 3.0
    min_cared_groups: int = 2
    max_cared_groups: int = 4
    num_liked: int = 2
    num_disliked: int = 2


def draw_agent(rng: np.random.Generator, *, user_id: str, split: Split, model: TasteModel) -> Agent:
    """Draw one agent's taste; attributes are returned in the world's order, which says nothing."""
    num_cared = int(rng.integers(model.min_cared_groups, model.max_cared_groups + 1))
    liked: list[str] = []
    disliked: list[str] = []
    for group in sorted(rng.choice(len(GROUPS), num_cared, replace=False).tolist()):
        values = ATTRIBUTE_GROUPS[GROUPS[group]]
        order = rng.permutation(NUM_VALUES)[: model.num_liked + model.num_disliked].tolist()
        liked += [values[i] for i in sorted(order[: model.num_liked])]
        disliked += [values[i] for i in sorted(order[model.num_liked :])]
    return Agent(
        user_id=user_id, liked_attributes=tuple(liked), disliked_attributes=tuple(disliked), split=split
    )


def taste_matrix(agent: Agent) -> npt.NDArray[np.float64]:
    """Taste in {-1, 0, 1}, shape (groups, values)."""
    taste = np.zeros((len(GROUPS), NUM_VALUES))
    for names, value in ((agent.liked_attributes, 1.0), (agent.disliked_attributes, -1.0)):
        for name in names:
            group = GROUP_OF[name]
            taste[GROUPS.index(group), ATTRIBUTE_GROUPS[group].index(name)] = value
    return taste


def draw_values(
    rng: np.random.Generator, *, taste: npt.NDArray[np.float64], beta: float, count: int
) -> npt.NDArray[np.int64]:
    """Attribute values of ``count`` images from softmax(beta * taste), shape (count, groups).

    A negative ``beta`` draws disliked images, zero draws images that no taste has touched.
    """
    weight = np.exp(beta * taste)
    cumulative = (weight / weight.sum(axis=1, keepdims=True)).cumsum(axis=1)
    uniform = rng.random((count, taste.shape[0], 1))
    values: npt.NDArray[np.int64] = (uniform > cumulative).sum(axis=2).clip(max=taste.shape[1] - 1)
    return values


def attribute_names(values: Sequence[int] | npt.NDArray[np.int64]) -> tuple[str, ...]:
    """Names of one value per group, in the order of :data:`GROUPS`."""
    return tuple(ATTRIBUTE_GROUPS[group][int(v)] for group, v in zip(GROUPS, values, strict=True))


def attribute_values(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Inverse of :func:`attribute_names` for a complete set in any order.

    Raises:
        ValueError: a group is missing or named twice.
    """
    found = {GROUP_OF[name]: ATTRIBUTE_GROUPS[GROUP_OF[name]].index(name) for name in names}
    if len(found) != len(GROUPS) or len(names) != len(GROUPS):
        raise ValueError(f"expected one attribute of each of {', '.join(GROUPS)}; got {', '.join(names)}")
    return np.array([found[group] for group in GROUPS])


def oracle_scores(
    liked: npt.NDArray[np.int64],
    disliked: npt.NDArray[np.int64],
    queries: npt.NDArray[np.int64],
    *,
    smoothing: float = 0.2,
) -> npt.NDArray[np.float64]:
    """Naive-Bayes log-odds that each query is liked, from true attributes.

    It counts values on both sides of the history with additive ``smoothing`` and adds the groups' log-ratios:
    the best a reader can do that sees attributes perfectly and knows nothing else of the agent.

    Args:
        liked: values of the liked images, shape (L, groups); L may be 0.
        disliked: values of the disliked images, shape (K, groups); K may be 0.
        queries: values of the images to judge, shape (Q, groups).
        smoothing: pseudo-count of every value.

    Returns:
        Log-odds, shape (Q,); positive means liked, zero means the history says nothing.
    """
    scores = np.zeros(len(queries))
    for group in range(queries.shape[1]):
        ratios = [
            np.log(np.bincount(side[:, group], minlength=NUM_VALUES) + smoothing)
            - np.log(len(side) + smoothing * NUM_VALUES)
            for side in (liked, disliked)
        ]
        scores += (ratios[0] - ratios[1])[queries[:, group]]
    return scores


def oracle_accuracy(*, model: TasteModel, num_references: int, num_agents: int, seed: int) -> float:
    """Accuracy of :func:`oracle_scores` over fresh agents, ``num_references`` images a side, ties half."""
    rng = np.random.default_rng(seed)
    right: list[float] = []
    for _ in range(num_agents):
        taste = taste_matrix(draw_agent(rng, user_id="oracle", split="test", model=model))
        liked = draw_values(rng, taste=taste, beta=model.beta, count=num_references)
        disliked = draw_values(rng, taste=taste, beta=-model.beta, count=num_references)
        for sign in (1.0, -1.0):
            queries = draw_values(rng, taste=taste, beta=sign * model.beta, count=4)
            scores = oracle_scores(liked, disliked, queries)
            right += (np.where(scores == 0, 0.5, np.sign(scores) == sign)).tolist()
    return float(np.mean(right))
