"""Tiny models from the real classes and synthetic data for tests; never imported by the rest of prefgen."""
