"""The one error of this module: a PrefgenError that library users can also catch as ValueError."""

from __future__ import annotations

from prefgen.errors import PrefgenError


class MMDError(PrefgenError, ValueError):
    """Shapes, weights, kernels or estimators that do not fit together."""
