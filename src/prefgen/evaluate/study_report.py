"""``study.json`` as a report: main table, claims, ablations, curves, galleries, costs, seeds and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefgen.evaluate.blocks import Block, Figure, Grid, Heading, Paragraph, curve_plot
from prefgen.evaluate.page import interval, number
from prefgen.evaluate.report import label

Study = Mapping[str, Any]

COLUMNS = {
    "utility": "utility",
    "own_wins": "own wins",
    "mllm_wins": "own wins, MLLM judge",
    "liked_hits": "liked shown",
    "disliked_hits": "disliked shown",
    "prompt_fidelity": "prompt fidelity",
    "clip_text": "CLIP-T",
    "clip_image": "CLIP-I",
    "diversity": "diversity",
}
"""Figures with an interval, in the order of the main table."""

SET_COLUMNS = {"fid": "FID", "kid": "KID", "cmmd": "CMMD", "elo": "Elo"}
STRUCTURE = {"core": "core", "sem": "sem", "aligned": "aligned"}


def study_blocks(
    study: Study, *, grids: Sequence[Figure], failures: Sequence[Figure], heat_maps: Sequence[Figure]
) -> list[Block]:
    """The whole report.

    Args:
        study: the content of study.json.
        grids: the first users with their histories.
        failures: the worst users, chosen by number.
        heat_maps: of the layer study.
    """
    return [
        Heading(words="Does it work, against whom, and which part does the work?", level=1),
        Paragraph(words=_opening(study)),
        *_verdict(study),
        *_main(study),
        *_claims(study),
        *_ablations(study),
        *_curves(study),
        *_layers(study, heat_maps=heat_maps),
        *_structure(study),
        *_gallery("Pictures", "The first users of the split, their history above.", grids),
        *_gallery(
            "Where it fails",
            "The users whose own pictures gained least over the base model's, by that number alone.",
            failures,
        ),
        *_costs(study),
        *_absent(study),
        *_made_with(study),
    ]


def _opening(study: Study) -> str:
    seeds = ", ".join(str(seed) for seed in study["seeds"])
    return (
        f"{study['about']}. {study['num_users']} users and subjects that nothing was trained on; training "
        f"seeds {seeds}; the same prompts and noise under every condition. A user's figure is the mean over "
        "seeds; brackets are 95 % bootstrap intervals over users; p-values are of two-sided sign-flip tests "
        "after Holm's correction over their table."
    )


def _absent(study: Study) -> list[Block]:
    rows = tuple((one["preset"], one["about"], one["command"]) for one in study.get("absent", ()))
    if not rows:
        return []
    return [
        Heading(words="Not measured here"),
        Paragraph(
            words="The same study with other models. None of its numbers stand in this report; these "
            "commands make them."
        ),
        Grid(head=("preset", "models and data", "command"), rows=rows),
    ]


def _verdict(study: Study) -> list[Block]:
    found, kept = study["main"]["verdict"], study["main"]["fidelity_kept"]

    def names(words: Sequence[str]) -> str:
        return ", ".join(label(name) for name in words) or "none"

    said = "holds" if found["holds"] else "does not hold"
    return [
        Paragraph(
            words=f"The study's claim {said}: own profile beats every condition that may not see the true "
            f"attributes, at a loss of prompt fidelity under 5 %. Beaten: {names(found['beaten'])}. Not told "
            f"apart: {names(found['not_told_apart'])}. Lost to: {names(found['lost_to'])}. Prompt fidelity "
            f"lost against the base model: {found['fidelity_loss']:.1%} (kept {interval(kept)})."
        )
    ]


def _main(study: Study) -> list[Block]:
    rows = study["main"]["conditions"]
    known = [name for name in COLUMNS if any(row.get(name) for row in rows.values())]
    sets = [name for name in SET_COLUMNS if any(row.get(name) is not None for row in rows.values())]
    against = study["main"]["own_minus"]
    return [
        Heading(words="Main table"),
        Paragraph(
            words="Utility: the judge's probability of liked minus disliked attributes. Own wins: how often "
            "the own picture has the higher utility, ties half. Liked and disliked shown: share of the "
            "user's attribute groups. CLIP by the pipeline's own encoders, which feed the profile too. FID "
            "and KID on the judge's last hidden layer, CMMD on image embeddings, against the drawings these "
            "users like, means over seeds." + about_mllm_judge(study.get("mllm_judge", {}))
        ),
        Grid(
            head=("condition", *(COLUMNS[name] for name in known), *(SET_COLUMNS[name] for name in sets)),
            rows=tuple(
                (
                    label(condition),
                    *(interval(row.get(name)) for name in known),
                    *(number(row.get(name), digits=0 if name == "elo" else 3) for name in sets),
                )
                for condition, row in rows.items()
            ),
        ),
        Heading(words="Own minus each condition, user by user", level=3),
        Grid(
            head=("condition", "difference in utility", "p", "utility by seed"),
            rows=tuple(
                (
                    label(name),
                    interval(one),
                    p_value(one["p_holm"]),
                    ", ".join(number(value) for value in rows[name]["by_seed"]),
                )
                for name, one in against.items()
            ),
        ),
    ]


def about_mllm_judge(judge: Mapping[str, Any]) -> str:
    """What the MLLM judge's column says and whether it is independent; nothing where none was asked."""
    if not judge:
        return ""
    words = "" if judge["independent"] else " It counts as not independent: see the single reports."
    return (
        f" MLLM judge: how often a {judge['family']} model chooses own in both orders, half where its "
        f"answers disagree; the order decided {number(judge['flips']['mean'], digits=2)} of the pairs.{words}"
    )


def p_value(value: float) -> str:
    """Three digits, or that it is smaller."""
    return "< .001" if value < 0.001 else f"{value:.3f}"


def _claims(study: Study) -> list[Block]:
    if not study["claims"]:
        return []
    rows = tuple(
        (one["words"], f"{one['better']} minus {one['than']}", interval(one["difference"]), one["verdict"])
        for one in study["claims"]
    )
    return [
        Heading(words="What the data say about each claim"),
        Paragraph(words="Own utility of the two runs, user by user, on the seeds both have."),
        Grid(head=("claim", "compared", "difference [interval]", "the data"), rows=rows),
    ]


def _ablations(study: Study) -> list[Block]:
    if not study["ablations"]:
        return []
    rows = tuple(
        (
            f"{row['group']}: {row['words']}" if row["group"] else row["words"],
            interval(row["utility"]),
            interval(row["minus_main"]),
            p_value(row["minus_main"]["p_holm"]),
            interval(row["own_wins"]),
            interval(row["prompt_fidelity"]),
            interval(row["align"].get("recall_1")),
            number(row["align"].get("mmd_after"), digits=4),
        )
        for row in study["ablations"]
    )
    head = ("changed", "own utility", "minus main", "p", "wins over base", "fidelity", "R@1", "MMD² after")
    return [Heading(words="Ablations"), Grid(head=head, rows=rows)]


def _curves(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for name, points in study["curves"].items():
        lines = {
            words: [{"x": point["x"], **point[figure]} for point in points if point[figure]]
            for figure, words in (
                ("utility", "own utility"), ("own_wins", "wins over base"), ("prompt_fidelity", "fidelity")
            )
        }  # fmt: skip
        shown = {words: line for words, line in lines.items() if line}
        if not shown:
            continue
        data = curve_plot(shown, x_label=name, y_label="own pictures")
        caption = f"Own pictures by {name}, with 95 % intervals over users."
        blocks.append(Figure(name=f"curve-{name.replace(' ', '_')}.svg", data=data, caption=caption))
    return [Heading(words="Dials"), *blocks] if blocks else []


def _layers(study: Study, *, heat_maps: Sequence[Figure]) -> list[Block]:
    probe = study["probe"]
    if not probe:
        return []
    rows = tuple(
        (
            words,
            interval(probe[task]["accuracy"]),
            number(probe[task]["chance"]),
            interval(probe[task]["control"]),
            f"layer {probe[task]['layer']}, {probe[task]['pooling']}",
        )
        for task, words in (("inter", "which user is this"), ("intra", "liked or disliked"))
    )
    head = ("probe", "accuracy of the chosen cell", "chance", "shuffled labels", "cell")
    return [Heading(words="Which layers hold the taste"), Grid(head=head, rows=rows), *heat_maps]


def _structure(study: Study) -> list[Block]:
    found = study["structure"]
    if "cka" not in found:
        return []
    rows = [
        ("CKA of sem before and after", number(found["cka"]), "1"),
        ("neighbours kept", number(found["neighbourhood_overlap"]), number(found["overlap_chance"])),
    ]
    if "separability" in found:
        rows.append(("aligned told apart from texts", number(found["separability"]), "0.500"))
    for name, words in STRUCTURE.items():
        if name in found.get("cosines", {}):
            gap = found["cosines"][name]["gap"]
            rows.append((f"{words}: cosine within minus between users", interval(gap), "0.000"))
    head = ("figure", "value", "reference: chance or perfect")
    return [Heading(words="Is the structure kept?"), Grid(head=head, rows=tuple(rows))]


def _gallery(heading: str, words: str, figures: Sequence[Figure]) -> list[Block]:
    return [Heading(words=heading), Paragraph(words=words), *figures] if figures else []


def _costs(study: Study) -> list[Block]:
    totals: dict[str, list[Mapping[str, Any]]] = {}
    for row in study["costs"]:
        totals.setdefault(row["step"], []).append(row)
    rows = tuple(
        (
            name,
            str(len(steps)),
            f"{sum(step['seconds'] for step in steps) / len(steps):.1f}",
            f"{sum(step['seconds'] for step in steps):.0f}",
            f"{max(step['peak_mb'] for step in steps):.0f}",
        )
        for name, steps in totals.items()
    )
    blocks: list[Block] = [
        Heading(words="What it cost"),
        Grid(head=("step", "times", "seconds each", "seconds in all", "largest memory, MB"), rows=rows),
    ]
    if study["parameters"]:
        kept = tuple((name, f"{count:,}") for name, count in study["parameters"].items())
        blocks.append(Grid(head=("part", "numbers in its artefact"), rows=kept))
    if study["rivals"]:
        shown = tuple(
            (
                label(name),
                f"{found.get('parameters_per_user', 0):,}",
                ", ".join(f"{value:.3f}" for value in found.get("curve", ())) or "–",
            )
            for name, found in study["rivals"].items()
        )
        blocks.append(Grid(head=("rival", "numbers of a user", "training loss over its steps"), rows=shown))
    if study["trials"]:
        tried = tuple(
            (
                trial["run"],
                trial["name"],
                ", ".join(f"{value}: {found:.4g}" for value, found in trial["found"].items()),
                trial["best"],
            )
            for trial in study["trials"]
        )
        blocks.append(
            Grid(head=("run", "tried, on validation users", trial_head(study), "taken"), rows=tried)
        )
    return blocks


def trial_head(study: Study) -> str:
    """The figures that decided, e.g. ``fit|val/loss``."""
    return ", ".join(dict.fromkeys(trial["figure"] for trial in study["trials"]))


def _made_with(study: Study) -> list[Block]:
    versions = ", ".join(f"{name} {found}" for name, found in study["versions"].items())
    words = f"{versions}; {study['machine']}."
    if study["missing"]:
        words += f" Not finished, so not in here: {', '.join(study['missing'])}."
    return [Heading(words="Made with"), Paragraph(words=words)]
