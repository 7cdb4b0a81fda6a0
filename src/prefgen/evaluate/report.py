"""``report.html``: metrics.json in tables, plots and pictures, each figure with what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prefgen.evaluate.page import (
    PlotRow,
    interval,
    interval_plot,
    number,
    page,
    picture,
    strip,
    table,
    text,
)
from prefgen.evaluate.report_extra import extra_section
from prefgen.evaluate.report_stages import align_section, judge_section, probe_section, training_section
from prefgen.whole_file import write_text

Metrics = Mapping[str, Any]

LABELS = {
    "image_only": "image only",
    "words_mllm": "words of the MLLM",
    "image_mean": "mean of liked images",
    "image_minus": "liked minus disliked images",
}
HEADLINES = {
    "own_vs_base": "own profile preferred to no profile",
    "own_vs_other": "own profile preferred to another user's",
    "own_vs_image_only": "own profile preferred to one liked image",
}
PAIR_MEANINGS = {
    "own_vs_base": "does a profile help at all",
    "own_vs_other": "is it THIS user's taste and not just any user's: chance is .50",
    "own_vs_image_only": "is it worth more than one liked image in an adapter of its own",
    "own_vs_words": "against someone who is told the true attributes",
    "own_vs_real": "against real drawings of the taste, the ceiling",
    "other_vs_base": "what any profile does, whoever it belongs to",
    "image_only_vs_base": "what one liked image does",
    "words_vs_base": "what true words do: can the base model be steered at all",
    "own_vs_words_mllm": "against the language model's own words for the taste, in the prompt",
    "own_vs_image_mean": "against image only's adapter on the mean of all liked references",
    "own_vs_image_minus": "the same, disliked references taken off",
    "own_vs_feedback": "against references in the base model's self-attention, nothing trained",
    "own_vs_inversion": "against words learned for each user",
}


@dataclass(frozen=True, kw_only=True)
class ShownUser:
    """One user whose pictures are shown.

    Attributes:
        title: who, and why this one.
        margin: mean utility of the own pictures minus the base model's.
        worst: chosen for its small margin.
        likes: true liked attributes; may be empty.
        dislikes: true disliked ones.
        liked: pixels (N,3,H,W) of the liked references.
        disliked: pixels (N,3,H,W) of the disliked ones.
        anchor: pixels (1,3,H,W) of the one liked image that image only sees, and own beside the others.
        prompts: P prompts.
        pictures: condition -> (P,3,H,W).
    """

    title: str
    margin: float
    worst: bool
    likes: tuple[str, ...]
    dislikes: tuple[str, ...]
    liked: Tensor
    disliked: Tensor
    anchor: Tensor
    prompts: tuple[str, ...]
    pictures: Mapping[str, Tensor]


def label(condition: str) -> str:
    """A condition as it is written in tables."""
    return LABELS.get(condition, condition)


def pair_label(pair: str) -> str:
    """``own_vs_base`` -> ``own against base``."""
    first, second = pair.split("_vs_")
    return f"{label(first)} against {label(second)}"


def write_report(
    path: Path,
    *,
    metrics: Metrics,
    shown: Sequence[ShownUser],
    conditions: Mapping[str, str],
    heat_maps: Mapping[str, Path],
    attribution: str,
) -> None:
    """Write the page in one piece.

    Args:
        path: the file.
        metrics: the content of metrics.json.
        shown: users with their pictures.
        conditions: condition -> what it is, in the order of the columns.
        heat_maps: probe task -> PNG file.
        attribution: a line about who made the pictures.
    """
    sections = [
        _head(metrics),
        _preference(metrics, conditions=conditions),
        _fidelity(metrics),
        _grids(shown, conditions=conditions),
        _questions(metrics),
        probe_section(metrics["probe"], heat_maps=heat_maps),
        align_section(metrics["align"]),
        _copying(metrics),
        extra_section(metrics["extra"], label=label) if "extra" in metrics else "",
        judge_section(metrics["judge"]),
        training_section(metrics),
    ]
    if attribution:
        sections.append(f'<p class="soft">{text(attribution)}</p>\n')
    write_text(path, text=page("prefgen: evaluation", body="".join(sections)))


def _head(metrics: Metrics) -> str:
    settings = metrics["settings"]
    opening = (
        "<h1>Does it follow taste?</h1>\n"
        f'<p class="soft">{metrics["num_users"]} users and {len(metrics["subjects"])} subjects that no '
        f"stage was trained on, {metrics['num_prompts']} prompts a user, the same starting noise under every "
        f"condition, {settings['num_steps']} denoising steps, guidance {settings['guidance_scale']:g}, "
        f"user_scale {settings['user_scale']:g}, seed {metrics['seed']}. Figures are means over users; "
        "brackets are 95 % bootstrap intervals over users.</p>\n"
    )
    rows = [
        [text(words), interval(metrics[pair]), _verdict(metrics[pair], above=0.5)]
        for pair, words in HEADLINES.items()
        if pair in metrics
    ]
    fidelity, kept = metrics["prompt_fidelity"], metrics["prompt_fidelity_kept"]
    rows.append(
        [
            "subject of the prompt recognised, own profile",
            interval(fidelity["own"]),
            f"base model {number(fidelity['base']['mean'])}; {kept['mean']:.1%} of it kept",
        ]
    )
    ceiling = f"the oracle reaches {number(metrics['oracle']['mean'])}" if "oracle" in metrics else ""
    rows.append(
        ["language model says rightly: liked or disliked", interval(metrics["vqa_accuracy"]), ceiling]
    )
    missing = "".join(f'<p class="note">Missing: {text(words)}</p>\n' for words in metrics["missing"])
    return opening + table(["how often", "mean [interval]", "beside it"], rows=rows, numeric=(1,)) + missing


def _verdict(estimate: Metrics, *, above: float) -> str:
    if estimate["low"] > above:
        return f'<span class="good">clearly above {above:g}</span>'
    if estimate["high"] < above:
        return f'<span class="bad">clearly below {above:g}</span>'
    return f"not told apart from {above:g}"


def _preference(metrics: Metrics, *, conditions: Mapping[str, str]) -> str:
    pairs = [pair for pair in PAIR_MEANINGS if pair in metrics]
    plot = interval_plot(
        [
            PlotRow(
                label=pair_label(p), mean=metrics[p]["mean"], low=metrics[p]["low"], high=metrics[p]["high"]
            )
            for p in pairs
        ],
        middle=0.5,
        left="the first loses always",
        right="the first wins always",
    )
    wins = [[text(pair_label(p)), interval(metrics[p]), text(PAIR_MEANINGS[p])] for p in pairs]
    utilities = [
        [text(label(name)), interval(metrics["utility"][name]), text(words)]
        for name, words in conditions.items()
        if name in metrics["utility"]
    ]
    return (
        "<h2>Which pictures does the user like better?</h2>\n"
        "<p>Two pictures of one prompt, from the same noise. The one whose attributes fit the user better "
        "wins, ties count half. The judge that decides trained none of the models: its utility is the "
        "probability of the user's liked attributes minus that of the disliked ones, without the subject, "
        "which the prompt fixes.</p>\n"
        + plot
        + table(["win rate", "mean [interval]", "what it says"], rows=wins, numeric=(1,))
        + "<h3>Mean utility of each condition</h3>\n"
        + table(["condition", "mean [interval]", "what it is"], rows=utilities, numeric=(1,))
    )


def _fidelity(metrics: Metrics) -> str:
    subject = metrics["judge"]["subject"]
    rows = [
        [text(label(name)), interval(found), "held to its own subject" if name == "real" else ""]
        for name, found in metrics["prompt_fidelity"].items()
    ]
    return (
        "<h2>Is it still what was asked for?</h2>\n"
        f"<p>How often the judge, choosing among the {subject['num_subjects']} subjects of the evaluation, "
        f"names the one in the prompt; guessing gives {number(1 / subject['num_subjects'])}. On real "
        f"drawings it is right {number(subject['clean'])} of the time, after the VAE's round trip "
        f"{number(subject['restored'])}.</p>\n"
        + table(["condition", "mean [interval]", ""], rows=rows, numeric=(1,))
    )


def _grids(shown: Sequence[ShownUser], *, conditions: Mapping[str, str]) -> str:
    body = (
        "<h2>Pictures</h2>\n<p>Above what each user has shown, below it the same prompts from the same "
        "noise under every condition. The first users are the first of the split; the others are those "
        "whose own pictures gained least, chosen by that number and not by hand. Nothing was picked by "
        "eye.</p>\n"
    )
    names = [name for name in conditions if any(name in user.pictures for user in shown)]
    return body + "".join(_grid(user, names=names) for user in shown)


def _grid(user: ShownUser, *, names: Sequence[str]) -> str:
    taste = ""
    if user.likes or user.dislikes:
        taste = (
            f'<p class="soft">truly likes {text(", ".join(user.likes) or "nothing named")}; '
            f"dislikes {text(', '.join(user.dislikes) or 'nothing named')}; "
            f"utility gained over the base model: {user.margin:+.3f}</p>\n"
        )
    strips = {
        "liked": user.liked,
        "disliked": user.disliked,
        "the one liked image of image only": user.anchor,
    }
    history = "".join(
        f"<figure>{strip(pixels, label=words)}<figcaption>{words}</figcaption></figure>"
        for words, pixels in strips.items()
    )
    head = "".join(f"<th>{text(label(name))}</th>" for name in names)
    rows = ""
    for i, prompt in enumerate(user.prompts):
        cells = "".join(
            f"<td>{picture(user.pictures[name][i], label=f'{label(name)}: {prompt}')}</td>"
            if name in user.pictures
            else "<td>–</td>"
            for name in names
        )
        rows += f"<tr><td>{text(prompt)}</td>{cells}</tr>"
    grid = f'<div class="wide"><table class="grid"><tr><th></th>{head}</tr>{rows}</table></div>\n'
    return f"<h3>{text(user.title)}</h3>\n{taste}{history}{grid}"


def _questions(metrics: Metrics) -> str:
    rows = [
        ["the MLLM with its LoRA", interval(metrics["vqa_accuracy"]), "the same unseen users and subjects"],
        ["the MLLM before LoRA", interval(metrics["vqa_before_lora"]), "what it knew without stage vqa"],
        [
            "history-blind control",
            interval(metrics["history_blind"]),
            "the same questions behind another user's history; .50 must lie inside",
        ],
    ]
    if "oracle" in metrics:
        oracle = "naive Bayes on the true attributes of the same questions: no reader could do better by much"
        rows.insert(0, ["oracle", interval(metrics["oracle"]), oracle])
        rows.insert(2, ["share of the oracle", interval(metrics["vqa_of_oracle"]), "the two means divided"])
    count = metrics["settings"]["num_references"]
    return (
        "<h2>Does the language model see the taste?</h2>\n"
        f"<p>{metrics['num_questions']} questions “Does this user like this image?” to "
        f"{metrics['vqa_accuracy']['num_users']} unseen users, each behind up to {count} liked and {count} "
        "disliked images; half of the images asked about are liked.</p>\n"
        + table(["who answers", "right [interval]", "what it says"], rows=rows, numeric=(1,))
    )


def _copying(metrics: Metrics) -> str:
    copying = metrics["copying"]
    names = dict.fromkeys(name for rows in copying.values() for name in rows)
    rows = [
        [
            "the history's images to each other" if name == "history" else text(label(name)),
            interval(copying["pixels"].get(name)),
            interval(copying["embedding"].get(name)),
        ]
        for name in names
    ]
    return (
        "<h2>Does it copy the history?</h2>\n"
        "<p>Distance of each picture to the nearest image of its user's history: in pixels (root mean "
        "square, 0 to 2) and in the image encoder's space (one minus cosine). Own pictures lie a little "
        "nearer than the base model's if they follow the taste; far below the last line they would be "
        "copies.</p>\n" + table(["condition", "pixels", "image embedding"], rows=rows, numeric=(1, 2))
    )
