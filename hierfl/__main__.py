"""``python -m hierfl``: the same as the command ``hierfl``."""

from hierfl.cli import main

main()
