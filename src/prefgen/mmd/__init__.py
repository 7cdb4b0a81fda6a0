"""Maximum mean discrepancy in one pass: ``from prefgen.mmd import mmd2, MMDLoss``. Imports torch only."""

from prefgen.mmd.api import MMDTerms, mmd2
from prefgen.mmd.bandwidth import DEFAULT_MULTIPLIERS, to_sigma
from prefgen.mmd.errors import MMDError
from prefgen.mmd.loss import MMDLoss

__all__ = ["DEFAULT_MULTIPLIERS", "MMDError", "MMDLoss", "MMDTerms", "mmd2", "to_sigma"]
