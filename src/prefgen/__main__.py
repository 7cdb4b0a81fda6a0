"""``python -m prefgen``."""

from prefgen.cli import entry

if __name__ == "__main__":
    entry()
