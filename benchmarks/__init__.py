"""Is it fast, and in how much memory? One file per question; `python -m benchmarks` asks them all
and writes `results/`.
"""
