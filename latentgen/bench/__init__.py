"""Measuring speed and memory, in turns with a reference."""
