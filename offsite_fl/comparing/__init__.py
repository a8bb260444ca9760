"""Federations side by side: a grid of strategies, emulators, partitions and seeds, each cell a Flower simulation."""
