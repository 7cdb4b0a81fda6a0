"""Maximum mean discrepancy in one pass: ``from prefgen.mmd import mmd2, MMDLoss``. Imports torch only."""

from prefgen.mmd.api import MMDTerms, cmmd, mmd, mmd2
from prefgen.mmd.bandwidth import DEFAULT_MULTIPLIERS, to_sigma
from prefgen.mmd.dispatch import describe_backend
from prefgen.mmd.errors import MMDError
from prefgen.mmd.loss import MMDLoss
from prefgen.mmd.reference import Reference
from prefgen.mmd.rff import rff_mmd2
from prefgen.mmd.sums import KernelSums, kernel_matrix, kernel_sums
from prefgen.mmd.two_sample import TestResult, mmd_test

__all__ = [
    "DEFAULT_MULTIPLIERS",
    "KernelSums",
    "MMDError",
    "MMDLoss",
    "MMDTerms",
    "Reference",
    "TestResult",
    "cmmd",
    "describe_backend",
    "kernel_matrix",
    "kernel_sums",
    "mmd",
    "mmd2",
    "mmd_test",
    "rff_mmd2",
    "to_sigma",
]
