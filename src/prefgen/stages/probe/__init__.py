"""Stage probe."""
