"""Approximate speed: modules of a network that are not computed in every call, or not in full. Always asked for, never a default; each run has its
own."""
