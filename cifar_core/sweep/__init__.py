"""Trains several recipes with several seeds and values, as ordinary run folders, here or on a Ray cluster.

    python -m cifar_core.sweep RECIPE… --seeds 0-4 [--set KEY=A,B,C] [--ray ADDRESS]

Each run is a process of its own that runs `cifar_core.train --resume`, so a sweep and single runs give the same run
folders. Only `cluster` needs `ray`.
"""
