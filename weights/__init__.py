"""Cards of checkpoints, and glyph's own weights."""
