"""Networks and frozen parts, with plain arguments and no configuration objects."""
