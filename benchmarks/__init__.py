"""How fast the package is, and in how much memory.

A question is a file with a ``TITLE``, ``rows(device)``, and a ``HEADER`` of what its result holds
beside the rows. `python -m benchmarks` asks them all and writes `results/`.
"""
