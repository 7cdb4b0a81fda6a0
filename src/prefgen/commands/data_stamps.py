"""``prefgen data stamps``: Tux Paint's stamps as subjects for agents and drawings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EPILOG = """\
example (Debian; 'apt-get download tuxpaint-stamps-default' and 'dpkg-deb -x FILE.deb DIR' need no root):
  prefgen data stamps /usr/share/tuxpaint/stamps --out work/stamps/subjects
  prefgen data drawings --subjects work/stamps/subjects --out work/stamps/drawings
  prefgen data agents --subjects work/stamps/subjects --out work/stamps/raw
"""


def add_stamps(actions: Any) -> None:
    """Add ``stamps`` to the actions of ``prefgen data``."""
    text = "cut subjects out of Tux Paint's stamps: photos and cartoons with sentences"
    parser = actions.add_parser("stamps", help=text, description=f"{text.capitalize()}.", epilog=_EPILOG)
    parser.add_argument("path", type=Path, help="the tree of stamps; nothing outside it is read")
    parser.add_argument("--out", type=Path, required=True, help="folder for subjects.json and the pictures")
    parser.add_argument(
        "--max-subjects", type=int, default=115, help="shared out over the families; 0 for no limit (115)"
    )
    parser.add_argument("--max-pictures", type=int, default=4, help="most pictures of a subject (4)")
    parser.add_argument("--max-words", type=int, default=4, help="most words of a phrase (4)")
    parser.add_argument(
        "--test-share", type=float, default=0.28, help="part of each family held out of histories (0.28)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen and held out (0)")
    parser.set_defaults(run=run_stamps)


def run_stamps(args: argparse.Namespace) -> int:
    """``prefgen data stamps``."""
    from tqdm import tqdm

    from prefgen.data.agents.contact import attribute_sheet, subject_sheet
    from prefgen.data.agents.cutouts import SubjectFolder
    from prefgen.data.sources.stamps import StampsPlan, import_stamps

    plan = StampsPlan(
        max_subjects=args.max_subjects,
        max_pictures=args.max_pictures,
        max_words=args.max_words,
        test_share=args.test_share,
        seed=args.seed,
    )
    with tqdm(unit="family", desc="cutting out", dynamic_ncols=True, delay=0.3) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        content = import_stamps(args.path, out=args.out, plan=plan, progress=show)
    subjects = SubjectFolder(args.out)
    subject_sheet(subjects).save(args.out / "subjects.png")
    attribute_sheet(seed=args.seed, subjects=subjects).save(args.out / "attributes.png")
    print(format_stamps(content, out=args.out))
    return 0


def format_stamps(content: dict[str, Any], *, out: Path) -> str:
    """What ``prefgen data stamps`` prints in the end."""
    from prefgen.data.sources.stamps import REASONS

    subjects = content["subjects"]
    pictures = [picture for subject in subjects for picture in subject["pictures"]]
    photos = sum(picture["kind"] == "photo" for picture in pictures)
    lines = [
        f"left out: {len(names):,} x {reason}: {REASONS[reason]}"
        for reason, names in content["left_out"].items()
    ]
    held = sum(subject["test"] for subject in subjects)
    lines += [
        f"{len(subjects):,} subjects, {held:,} of them for test agents only, on {photos:,} photos and "
        f"{len(pictures) - photos:,} cartoons, are in {out / 'subjects.json'}",
        f"look at {out / 'subjects.png'} and {out / 'attributes.png'}",
    ]
    return "\n".join(lines)
