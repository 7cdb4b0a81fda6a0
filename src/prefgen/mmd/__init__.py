"""Maximum mean discrepancy in one pass: ``from prefgen.mmd import mmd2, MMDLoss``. Imports torch only."""

from prefgen.mmd.api import MMDTerms, cmmd, mmd, mmd2
from prefgen.mmd.bandwidth import DEFAULT_MULTIPLIERS, to_sigma
from prefgen.mmd.dispatch import describe_backend
from prefgen.mmd.errors import MMDError
from prefgen.mmd.loss import MMDLoss

__all__ = [
    "DEFAULT_MULTIPLIERS",
    "MMDError",
    "MMDLoss",
    "MMDTerms",
    "cmmd",
    "describe_backend",
    "mmd",
    "mmd2",
    "to_sigma",
]
