"""What runs inside the peers' own environments: one script each, which imports nothing of hierfl."""
