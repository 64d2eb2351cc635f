"""Measurements of hierfl, each against a yardstick taken in the same run. ``python -m benchmarks`` runs them all."""
