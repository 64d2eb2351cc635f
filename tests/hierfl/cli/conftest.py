"""The command line, in this process: ``hierfl("status", "-o", "json")``."""

from commands import hierfl

__all__ = ["hierfl"]
