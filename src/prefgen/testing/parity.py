"""Metrics and probes beside published implementations or closed forms: the largest difference of each.

``tools/metric_parity.py`` prints the table; the tests hold each case to its tolerance.
"""

from __future__ import annotations

from prefgen.testing.parity_case import ParityCase
from prefgen.testing.parity_pictures import PICTURE_CASES
from prefgen.testing.parity_probes import PROBE_CASES
from prefgen.testing.parity_statistics import STATISTIC_CASES

CASES: tuple[ParityCase, ...] = (*PICTURE_CASES, *STATISTIC_CASES, *PROBE_CASES)
"""All of them, in the order of the table."""
