"""The global side: decides rounds, adds the regions' partial aggregates, makes the next model.

Where things are: a step of a run in ``loop.py``, what regions and operators may say in ``service.py``, what is
kept in ``store.py`` (rows), ``blobs.py`` (models, states, partials) and ``commits.py`` (the arbiter).
"""
