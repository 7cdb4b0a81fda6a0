"""``prefgen evaluate humans``: a blind questionnaire for people, and its answers counted."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from prefgen.errors import ConfigError

DEFAULT_PAIRS = "own:base,own:other,own:image_only"
_EPILOG = """\
examples:
  prefgen evaluate workdir=work/x extra.save_pictures=true
  prefgen evaluate humans build --pictures work/x/report/pictures --out survey
  prefgen evaluate humans read answers-*.json --key survey/key.json --json survey/humans.json

Hand out questionnaire.html and keep key.json: it says which picture is which. The page sends nothing
anywhere; people save a JSON or CSV file and hand it back.
"""


def add_humans_parser(subparsers: Any) -> None:
    """Add ``humans build`` and ``humans read`` to the actions of ``prefgen evaluate``."""
    text = "a blind questionnaire for people, and its answers counted"
    parser = subparsers.add_parser("humans", help=text, description=text + ".", epilog=_EPILOG)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    build = actions.add_parser("build", help="write questionnaire.html and key.json")
    build.add_argument(
        "--pictures", type=Path, required=True, metavar="DIR", help="folder with pictures.json"
    )
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    build.add_argument(
        "--pairs",
        default=DEFAULT_PAIRS,
        help=f"conditions to compare, first:second (default {DEFAULT_PAIRS})",
    )
    build.add_argument("--num-questions", type=int, default=60, help="questions a person is asked (60)")
    build.add_argument(
        "--num-repeats", type=int, default=6,
        help="of them asked again at the end, the pictures named the other way round (6)",
    )  # fmt: skip
    build.add_argument("--seed", type=int, default=0, help="which questions are drawn (0)")
    build.add_argument("--title", default="Which picture would they like better?", help="heading of the page")
    build.set_defaults(run=run_build)
    read = actions.add_parser("read", help="count the answers")
    read.add_argument("answers", nargs="+", type=Path, metavar="FILE", help="files saved by the page")
    read.add_argument("--key", type=Path, required=True, metavar="FILE", help="key.json of the questionnaire")
    read.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    read.add_argument("--num-resamples", type=int, default=2000, help="behind each interval (2000)")
    read.add_argument("--seed", type=int, default=0, help="of the intervals (0)")
    read.set_defaults(run=run_read)


def run_build(args: argparse.Namespace) -> int:
    """Draw the questions and write page and key.

    Raises:
        PrefgenError: pictures or pairs that do not fit.
    """
    pairs = _pairs(args.pairs)
    from prefgen.evaluate.picture_folder import read_picture_folder
    from prefgen.evaluate.questionnaire import draw_questions, write_survey

    folder = read_picture_folder(args.pictures)
    survey = draw_questions(
        folder,
        pairs=pairs,
        num_questions=args.num_questions,
        num_repeats=args.num_repeats,
        seed=args.seed,
    )
    places = write_survey(args.out, survey=survey, folder=folder, title=args.title)
    asked = sum(not question.repeat_of for question in survey.questions)
    print(f"{asked} questions and {len(survey.questions) - asked} repeats about {len(folder.users)} users")
    if asked < args.num_questions:
        print(f"asked for {args.num_questions}: the pictures give no more")
    print(f"questionnaire: {places['questionnaire']}")
    print(f"key: {places['key']} (keep it: it names the conditions)")
    return 0


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for word in text.split(","):
        first, colon, second = (part.strip() for part in word.partition(":"))
        if not (first and colon and second):
            raise ConfigError(f"--pairs: expected first:second,first:second, got {word!r}")
        pairs.append((first, second))
    return pairs


def run_read(args: argparse.Namespace) -> int:
    """Count, print, and write json if asked.

    Raises:
        PrefgenError: answers or key that do not fit.
    """
    if args.num_resamples < 100:
        raise ConfigError(f"--num-resamples must be at least 100, got {args.num_resamples}")
    from prefgen.evaluate.answers import gather, human_figures
    from prefgen.evaluate.questionnaire import read_key

    survey = read_key(args.key)
    answers = gather(args.answers, survey=survey)
    figures = human_figures(answers, survey=survey, seed=args.seed, num_resamples=args.num_resamples)
    _print(figures)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {args.json}")
    return 0


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['num_answers']} answers of {figures['num_people']} people")
    print(f"\n{'':26}win rate  [95 % interval]   users  p (Holm)")
    for name, found in figures["pairs"].items():
        span = f"[{found['low']:.3f}, {found['high']:.3f}]"
        print(f"{name:26}{found['mean']:8.3f}  {span:17}{found['num_users']:6}  {found['p_holm']:.4f}")
    alpha = figures["krippendorff_alpha"]
    words = "not defined: no two people answered alike questions, or all gave one answer"
    if alpha is not None:
        words = f"{alpha['mean']:.3f} [{alpha['low']:.3f}, {alpha['high']:.3f}]"
    print(f"\nKrippendorff's alpha      {words}")
    if figures["left_chosen"] is not None:
        print(f"left picture chosen       {figures['left_chosen']:.3f}")
    for name, found in figures["people"].items():
        again = "" if found["same_again"] is None else f", same again {found['same_again']:.2f}"
        print(f"{name[:24]:26}{found['num_answers']} answers, ties {found['ties']:.2f}{again}")
