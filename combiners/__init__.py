"""One region: client updates in, one partial aggregate out.

Where to look: who is counted and when a region closes is decided in ``region.py`` (pure, with
``attempt.py`` and ``cohort.py``); bytes are checked and folded in ``intake.py``; what may leave is
made in ``hierfl/residency.py`` only; what a crash may not lose is in ``zone.py``.
"""
