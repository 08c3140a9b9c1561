"""Every error the library raises on purpose. Knows nothing else.

Each message is one sentence: what was given, what was expected, what to do.
"""

from __future__ import annotations


class LatentgenError(Exception):
    """Base of all errors below: catch it to catch everything the library refuses."""


class RequestError(LatentgenError, ValueError):
    """The request cannot be honoured as it stands; raised while planning, before any weight is touched."""


class ImageError(RequestError):
    """A picture or mask cannot be read or does not fit."""


class ModelError(LatentgenError):
    """A model folder, card or file is missing, damaged or not one that can be loaded."""


class OutputError(LatentgenError, OSError):
    """A result could not be written; nothing partial was left behind."""


class NotFiniteError(LatentgenError, ArithmeticError):
    """A network gave NaN or infinity, and computing it again in float32 did not cure it."""


class ParallelError(LatentgenError):
    """The processes that make a picture together have lost each other."""


class OutOfMemoryError(LatentgenError, MemoryError):
    """Memory ran out, and there was nothing left that could be done in less of it; what was held is freed."""


class TrainingError(LatentgenError):
    """A training command cannot start or go on."""
