"""The section of the report about figures on request: one table, tests, structure, rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefgen.evaluate.page import interval, number, table, text

FIGURES = {
    "liked_hits": ("liked attributes shown", "share of the user's groups in which a liked value is seen"),
    "disliked_hits": ("disliked attributes shown", "the same for disliked values: smaller is better"),
    "clip_text": ("CLIP-T", "cosine with the prompt's text"),
    "clip_image": ("CLIP-I", "mean cosine with the liked references; the profile is fed by this encoder"),
    "diversity": ("diversity", "mean cosine distance among a user's pictures"),
    "dino": ("DINO", "mean cosine with the liked references"),
    "lpips": ("LPIPS", "distance between a user's pictures"),
    "pickscore": ("PickScore", ""),
    "hpsv2": ("HPS v2", ""),
    "imagereward": ("ImageReward", ""),
    "viper": ("ViPer proxy", "0 to 1, told up to eight liked and disliked images"),
}
"""Table of users.json -> its heading, and what it says."""

SETS = {
    "fid": ("FID", "on the judge's last hidden layer"),
    "kid": ("KID", "on the same; may be negative"),
    "cmmd": ("CMMD", "on the pipeline's image embeddings"),
}


def extra_section(extra: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    """Everything under ``extra`` of metrics.json.

    Args:
        extra: what stands there.
        label: condition -> its words.
    """
    parts = [_figures(extra, label=label), _margins(extra, label=label), _sets(extra, label=label)]
    parts += [_mllm_judge(extra.get("mllm_judge", {}), label=label)]
    parts += [_structure(extra.get("structure", {})), _rivals(extra.get("conditions", {}), label=label)]
    body = "".join(parts)
    return f"<h2>Further figures</h2>\n{body}" if body else ""


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _figures(extra: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    known = [name for name in FIGURES if name in extra]
    if not known:
        return ""
    names = _columns([extra[name] for name in known])
    rows = [[text(label(name)), *(interval(extra[figure].get(name)) for figure in known)] for name in names]
    words = "; ".join(f"{FIGURES[name][0]}: {FIGURES[name][1]}" for name in known if FIGURES[name][1])
    return f"<p>{text(words)}.</p>\n" + table(
        ["condition", *(FIGURES[name][0] for name in known)], rows=rows, numeric=range(1, len(known) + 1)
    )


def _margins(extra: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    if "margins" not in extra:
        return ""
    utility, fidelity = extra["margins"]["utility"], extra["margins"]["prompt_fidelity"]
    rows = [
        [
            text(label(name)),
            interval(found),
            p_value(found["p_holm"]),
            interval(fidelity[name]),
            p_value(fidelity[name]["p_holm"]),
            interval(extra["elo"].get(name), digits=0),
        ]
        for name, found in utility.items()
    ]
    own = interval(extra["elo"]["own"], digits=0)
    return (
        "<h3>Own minus each other condition, user by user</h3>\n"
        "<p>Sign-flip tests, two-sided; p after Holm's correction over each column. Elo from every pair of "
        f"pictures of one prompt, mean 1000; own: {own}.</p>\n"
        + table(
            ["own minus", "utility", "p", "prompt fidelity", "p", "Elo of the other"],
            rows=rows,
            numeric=range(1, 6),
        )
    )


def p_value(value: float) -> str:
    """Three digits, or that it is smaller."""
    return "&lt; .001" if value < 0.001 else f"{value:.3f}"


def _sets(extra: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    if "sets" not in extra:
        return ""
    found = extra["sets"]
    rows = [
        [text(label(name)), *(interval(found[figure].get(name)) for figure in SETS)]
        for name in _columns([found[figure] for figure in SETS])
    ]
    words = "; ".join(f"{head} {what}" for head, what in SETS.values())
    return (
        f"<h3>Distance to the drawings these users like</h3>\n<p>{text(words)}. Comparable within this "
        "table only.</p>\n"
        + table(["condition", *(head for head, _ in SETS.values())], rows=rows, numeric=range(1, 4))
    )


def _mllm_judge(found: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    if not found:
        return ""
    warning = ""
    if not found["independent"]:
        warning = (
            '<p class="note">This judge counts as not independent: it holds the weights of model.mllm, from '
            "which stage vqa trained, or model.mllm is no folder to compare them with.</p>\n"
        )
    rows = [
        [
            text(label(name)),
            interval(row["wins"]),
            p_value(row["p_holm"]),
            number(row["ties"]),
            interval(row["flips"]),
            number(row["first_chosen"]),
        ]
        for name, row in found["own_against"].items()
    ]
    return (
        f"<h3>What an MLLM would choose for the user</h3>\n{warning}"
        f"<p>A {text(found['family'])} model is shown up to {found['num_references']} liked and as many "
        "disliked images, as far as possible such that no picture was drawn from, then own's picture and "
        "another condition's, once in either order. A pair counts as won where own is chosen both times, and "
        "half where the answers disagree. Flips: the same place is chosen in both orders, so that the place "
        f"decides; over all pairs {interval(found['flips'])}. The first place is chosen "
        f"{number(found['first_chosen'])} of the time. "
        "Sign-flip tests against one half, p after Holm's correction.</p>\n"
        + table(
            ["own against", "wins", "p", "ties", "flips", "first place chosen"],
            rows=rows,
            numeric=range(1, 6),
        )
    )


def _structure(found: Mapping[str, Any]) -> str:
    if "cka" not in found:
        return ""
    rows = [
        ["CKA of sem before and after the projector", number(found["cka"]), "1: alike up to rotation"],
        [
            "neighbours kept",
            number(found["neighbourhood_overlap"]),
            f"chance {number(found['overlap_chance'])}",
        ],
    ]
    if "separability" in found:
        rows.append(
            ["aligned told apart from texts by a linear probe", number(found["separability"]), "chance .5"]
        )
    for name, cosines in found.get("cosines", {}).items():
        rows.append(
            [
                f"{text(name)}: cosine within a user minus between users",
                interval(cosines["gap"]),
                f"{number(cosines['within']['mean'])} and {number(cosines['between']['mean'])}",
            ]
        )
    return f"<h3>Is the structure kept?</h3>\n<p>{found['num_users']} test users.</p>\n" + table(
        ["figure", "value", ""], rows=rows, numeric=(1,)
    )


def _rivals(conditions: Mapping[str, Any], *, label: Callable[[str], str]) -> str:
    rows = [
        [
            text(label(name)),
            f"{found.get('parameters_per_user', 0):,}",
            "; ".join(
                f"{text(key.replace('_', ' '))} {value:.3g}"
                for key, value in found.items()
                if isinstance(value, int | float) and key != "parameters_per_user"
            ),
            ", ".join(f"{value:.3f}" for value in found.get("curve", ())),
        ]
        for name, found in conditions.items()
    ]
    if not rows:
        return ""
    return "<h3>The further rivals</h3>\n" + table(
        ["condition", "numbers kept of a user", "", "training loss, in steps of its length"], rows=rows
    )
