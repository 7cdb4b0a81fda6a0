"""The plain reference: a float64 double loop over pairs, written from the definition and nothing else."""

import math

import numpy as np


def kernel_value(q, *, kernel, sigmas, coefs, alpha=1.0):
    r = math.sqrt(q)
    total = 0.0
    for sigma, coef in zip(sigmas, coefs, strict=True):
        if kernel == "gaussian":
            total += coef * math.exp(-q / (2 * sigma**2))
        elif kernel == "laplacian":
            total += coef * math.exp(-r / sigma)
        elif kernel == "rq":
            total += coef * (1 + q / (2 * alpha * sigma**2)) ** -alpha
        elif kernel == "imq":
            total += coef * (1 + q / sigma**2) ** -0.5
        else:
            total += -coef * r
    return total


def kernel_slope(q, *, kernel, sigmas, coefs, alpha=1.0):
    """Derivative by q; 0 for coincident points of the kernels with a kink."""
    r = math.sqrt(q)
    total = 0.0
    for sigma, coef in zip(sigmas, coefs, strict=True):
        if kernel == "gaussian":
            total -= coef / (2 * sigma**2) * math.exp(-q / (2 * sigma**2))
        elif kernel == "laplacian":
            total -= coef / (2 * r * sigma) * math.exp(-r / sigma) if r else 0.0
        elif kernel == "rq":
            total -= coef / (2 * sigma**2) * (1 + q / (2 * alpha * sigma**2)) ** (-alpha - 1)
        elif kernel == "imq":
            total -= coef * 0.5 / sigma**2 * (1 + q / sigma**2) ** -1.5
        else:
            total -= coef * 0.5 / r if r else 0.0
    return total


def reference_mmd2(
    x, y, *, kernel="gaussian", sigmas=(1.0,), coefs=None, alpha=1.0, estimator="biased", wx=None, wy=None
):
    """MMD^2 and its gradients, all float64, one pair at a time."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, m = len(x), len(y)
    coefs = [1 / len(sigmas)] * len(sigmas) if coefs is None else coefs
    w = np.full(n, 1 / n) if wx is None else np.asarray(wx, dtype=np.float64)
    v = np.full(m, 1 / m) if wy is None else np.asarray(wy, dtype=np.float64)
    own = 1.0 if estimator == "biased" else None
    sx = own or 1 / (1 - math.fsum(w * w))
    sy = own or 1 / (1 - math.fsum(v * v))
    sc = sx if estimator == "ustat" else 1.0
    gx, gy = np.zeros_like(x), np.zeros_like(y)
    parts = []
    shape = {"kernel": kernel, "sigmas": sigmas, "coefs": coefs, "alpha": alpha}

    def pair(a, b, factor, grad_a, grad_b):
        diff = a - b
        q = float(diff @ diff)
        parts.append(factor * kernel_value(q, **shape))
        change = factor * kernel_slope(q, **shape) * 2 * diff
        grad_a += change
        grad_b -= change

    for i in range(n):
        for j in range(n):
            if i != j or estimator == "biased":
                pair(x[i], x[j], sx * w[i] * w[j], gx[i], gx[j])
    for i in range(m):
        for j in range(m):
            if i != j or estimator == "biased":
                pair(y[i], y[j], sy * v[i] * v[j], gy[i], gy[j])
    for i in range(n):
        for j in range(m):
            if i != j or estimator != "ustat":
                pair(x[i], y[j], -2 * sc * w[i] * v[j], gx[i], gy[j])
    return math.fsum(parts), gx, gy
