"""The chaos suite: real federations, harmed on purpose, and what must be true of them afterwards (``FAULTS.md``)."""
