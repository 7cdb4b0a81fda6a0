"""Sections of the report about the stages and the judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefgen.evaluate.page import interval, number, picture_file, table, text

TASKS = {"inter": "Which user is this?", "intra": "Liked or disliked?"}
PAIRINGS = {
    "same_users": "the same users on both sides of small groups",
    "independent": "independent users on the two sides",
}


def probe_section(probe: Mapping[str, Any], *, heat_maps: Mapping[str, Path]) -> str:
    """Both tasks with their control, and the heat maps."""
    rows = [
        [
            text(question),
            interval(probe[task]["accuracy"]),
            number(probe[task]["chance"]),
            interval(probe[task]["control"]),
            f"layer {probe[task]['layer']}, {text(probe[task]['pooling'])}",
            str(probe[task]["num_users"]),
        ]
        for task, question in TASKS.items()
    ]
    maps = "".join(
        picture_file(
            path, caption=f"{TASKS[task]} Accuracy of every layer and pooling; the choice is framed."
        )
        for task, path in heat_maps.items()
    )
    return (
        "<h2>Where in the language model does the taste lie?</h2>\n"
        "<p>Linear probes on frozen hidden states, on validation users. The best of the chosen cells is "
        "shown; as it was chosen on these users, it is a little flattered. Shuffled labels must end at "
        "chance. "
        f"Rule: {text(probe['rule'])}.</p>\n"
        + table(
            ["probe", "accuracy [interval]", "chance", "shuffled labels", "cell", "users"],
            rows=rows,
            numeric=(1, 2, 3, 4),
        )
        + maps
        + "\n"
    )


def align_section(align: Mapping[str, Any]) -> str:
    """Retrieval and MMD for both pairings."""
    rows = []
    for name, words in PAIRINGS.items():
        found = align[name]
        if found is None:
            rows.append([text(words), "not fitted", *["–"] * 5])
            continue
        rows.append(
            [
                text(words),
                interval(found.get("recall_1")),
                interval(found.get("recall_10")),
                interval(found.get("permuted_recall_1")),
                interval(found.get("permuted_recall_10")),
                number(found.get("mmd_before"), digits=4),
                number(found.get("mmd_after"), digits=4),
            ]
        )
    known: Mapping[str, Any] = next((found for found in align.values() if found is not None), {})
    chance = ""
    if "chance_1" in known:
        chance = f" Guessing gives {number(known['chance_1'])} and {number(known['chance_10'])}."
    if "ceiling_recall_1" in known:
        chance += (
            " The own text itself, its attributes in another order, is found "
            f"{number(known['ceiling_recall_1']['mean'])} and {number(known['ceiling_recall_10']['mean'])} "
            "of the time: the ceiling."
        )
    return (
        "<h2>Did the taste arrive in the text space?</h2>\n"
        "<p>How often a user's own attribute text is the nearest (R@1) or among the ten nearest (R@10) of "
        f"all {text(known.get('users', ''))} users' texts, and MMD² between the two clouds before and after "
        "training. MMD alone does not see who is who: a small MMD with retrieval at chance is a cloud in the "
        f"right place with everybody in the wrong seat.{chance}</p>\n"
        + table(
            ["pairing", "R@1", "R@10", "R@1, wrong texts", "R@10, wrong texts", "MMD² before", "after"],
            rows=rows,
            numeric=(1, 2, 3, 4, 5, 6),
        )
    )


def judge_section(judge: Mapping[str, Any]) -> str:
    """How far the judge can be believed, attribute by attribute."""
    left_out = ", ".join(judge["left_out"]) or "none"
    never = (
        f" Never shown here, so not judged: {', '.join(judge['never_shown'])}."
        if judge["never_shown"]
        else ""
    )
    colour = {word: "good" if word in judge["judged"] else "bad" for word in judge["attributes"]}
    rows = [
        [
            text(word),
            number(found["clean"]),
            f'<span class="{colour[word]}">{number(found["restored"])}</span>',
            str(found["count"]),
            "" if word in judge["judged"] else "left out",
        ]
        for word, found in judge["attributes"].items()
        if found["count"]
    ]
    details = table(["attribute", "clean", "VAE round trip", "drawings", ""], rows=rows, numeric=(1, 2, 3))
    return (
        "<h2>How far can the judge be believed?</h2>\n"
        f"<p>Measured on {judge['num_images']} drawings of the test users: how often it names an attribute "
        "that is shown, on the clean drawing and after the VAE's round trip, which blurs everything the "
        f"diffusion model could draw. {len(judge['judged'])} attributes are judged. Below "
        f"{judge['minimum']:.2f} on the round trip, and so left out: {text(left_out)}.{text(never)}</p>\n"
        f"<details><summary>all attributes</summary>{details}</details>\n"
    )


def training_section(metrics: Mapping[str, Any]) -> str:
    """Steps, artefacts, settings."""
    rows = [
        [
            text(name),
            "–" if found.get("steps") is None else f"{found['steps']:,}",
            text(found.get("artefact", "–")),
            f"{found['bytes'] / 1e6:.2f} MB" if "bytes" in found else "–",
        ]
        for name, found in metrics["stages"].items()
    ]
    settings = [[text(name), text(value)] for name, value in metrics["settings"].items()]
    return (
        "<h2>What was trained</h2>\n"
        + table(["run", "steps", "artefact", "size"], rows=rows, numeric=(1, 3))
        + "<details><summary>settings of this evaluation</summary>"
        + table(["key", "value"], rows=settings)
        + "</details>\n"
    )
