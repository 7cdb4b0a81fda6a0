"""What the dials do on unseen users: user_scale, negative_user_scale, the number of images, updates.

    python tools/dial.py workdir=work/demo evaluate.num_users=128
    python tools/dial.py workdir=work/demo --images 1,4,16 --out work/demo/dial_small evaluate.num_users=32

Reads a workdir in which all four stages were fitted (as 'prefgen evaluate' does, and with its settings),
builds profiles, draws every condition from the same prompts and noise, and writes dial.json, dial.md,
dial.html and plots into --out (default: the workdir's folder dial). Killed anywhere, the same command goes
on; points may be added later.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

from prefgen.config import PRESETS
from prefgen.dials.plan import DialPlan
from prefgen.errors import ConfigError, PrefgenError
from prefgen.study.config import load_evaluate_config


def main() -> int:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", default="mini", metavar="NAME", help=f"one of {', '.join(PRESETS)} (mini)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration file instead of a preset")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (WORKDIR/dial)")
    parser.add_argument("--user-scales", default="0,.25,.5,.75,1,1.5", metavar="LIST")
    parser.add_argument("--negative-scales", default="0,.25,.5,.75,1,1.5", metavar="LIST")
    parser.add_argument("--images", default="1,2,4,8,16", metavar="LIST", help="images of either side")
    parser.add_argument("--reference", type=int, default=8, help="images behind both scales (8)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of 'prefgen evaluate'")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = load_evaluate_config(preset=args.preset, file=args.config, overrides=args.overrides)
        plan = DialPlan(
            user_scales=tuple(numbers(args.user_scales, name="--user-scales")),
            negative_scales=tuple(numbers(args.negative_scales, name="--negative-scales")),
            images=tuple(whole(n) for n in numbers(args.images, name="--images")),
            reference=args.reference,
            strength=config.evaluate.user_scale,
        )
        for required in config.required_inputs():
            required.check()
        from prefgen.dials.run import run_dial

        result = run_dial(config, plan=plan, out=args.out or Path(config.workdir) / "dial")
    except PrefgenError as error:
        print(f"dial: error: {error}", file=sys.stderr)
        return 2
    for name, place in result.places.items():
        print(f"{name}: {place}")
    return 0


def numbers(text: str, *, name: str) -> list[float]:
    """Numbers parted by commas.

    Raises:
        ConfigError: one is none.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(number) for number in found):
        raise ConfigError(f"{name}: expected numbers with commas, got {text!r}")
    return found


def whole(number: float) -> int:
    """A number of images.

    Raises:
        ConfigError: a fraction.
    """
    if number != int(number):
        raise ConfigError(f"--images: expected whole numbers, got {number:g}")
    return int(number)


if __name__ == "__main__":
    sys.exit(main())
