"""Print every metric beside its reference and the largest difference; exit 1 where one is too large.

    python tools/metric_parity.py

References that are not installed are named: pip install 'prefgen[parity]' brings them.
"""

from __future__ import annotations

import sys

from prefgen.testing.parity import CASES


def main() -> int:
    """One line a case."""
    bad = absent = 0
    print(f"{'metric':32}{'reference':38}{'largest difference':>20}{'allowed':>11}")
    for case in CASES:
        if not case.can_run:
            absent += 1
            print(f"{case.metric:32}{case.reference:38}{case.package + ' not installed':>20}")
            continue
        gap = case.largest()
        bad += not gap <= case.tolerance
        print(f"{case.metric:32}{case.reference:38}{gap:20.2e}{case.tolerance:11.0e}")
    print(f"{len(CASES) - bad - absent} of {len(CASES)} within their tolerance, {absent} not tried")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
