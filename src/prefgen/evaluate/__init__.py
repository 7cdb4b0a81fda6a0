"""Measures of what was learned; plain arguments, no configuration objects."""
