"""Numbers from arrays: retrieval ranks, nearest neighbours, quantiles. Knows numpy only; no picture, file or model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """(n, d) rows scaled to length 1; a zero row stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def ranks(queries: np.ndarray, classes: np.ndarray, own: np.ndarray, own_vectors: np.ndarray | None = None) -> np.ndarray:
    """How many classes are at least as near to each query as its own, by cosine; 0 is best. A tie counts against the query.

    Args:
        queries: (n, d), unit rows. classes: (m, d), unit rows.
        own: (n,) index of each query's class.
        own_vectors: (n, d), unit rows that stand for the own class instead (a prototype that leaves a drawing out).
    """
    scores = queries @ classes.T
    at = np.arange(len(queries))
    mine = scores[at, own] if own_vectors is None else (queries * own_vectors).sum(-1)
    scores[at, own] = -np.inf
    return (scores >= mine[:, None]).sum(1)


def shares(found: np.ndarray) -> dict[str, float]:
    """Share of ranks that are 0 and below 5."""
    return {"top1": round(float((found < 1).mean()), 4), "top5": round(float((found < 5).mean()), 4)}


def prototypes(vectors: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) drawings with class labels (n,) -> sums (count, d) and numbers (count,) of each class."""
    sums = np.zeros((count, vectors.shape[1]), np.float64)
    np.add.at(sums, labels, vectors)
    return sums, np.bincount(labels, minlength=count)


def without(sums: np.ndarray, own: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """(n, d) unit prototypes of the classes `own` (n,), each with one drawing (n, d) taken out."""
    return unit(sums[own] - left_out)


def nearest(queries: np.ndarray, chunks: Iterable[tuple[Sequence[int], np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of many vectors that come in chunks.

    Args:
        queries: (n, d) float32 in [0, 1].
        chunks: (row numbers, (k, d) float32 in [0, 1]) at a time.

    Returns:
        Root mean square distance (n,) and row number (n,).
    """
    best = np.full(len(queries), np.inf)
    rows = np.full(len(queries), -1)
    ours = (queries.astype(np.float64) ** 2).sum(1)
    for numbers, vectors in chunks:
        squared = ours[:, None] + (vectors.astype(np.float64) ** 2).sum(1) - 2.0 * (queries @ vectors.T)
        at = squared.argmin(1)
        found = np.sqrt(np.maximum(squared[np.arange(len(queries)), at], 0) / queries.shape[1])
        better = found < best
        best[better], rows[better] = found[better], np.asarray(numbers)[at[better]]
    return best, rows


def spread(values: Sequence[float] | np.ndarray, *, digits: int = 4) -> dict[str, float | int]:
    """Number, mean and quartiles."""
    if not len(values):
        return {"count": 0}
    low, middle, high = (round(float(q), digits) for q in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"count": len(values), "mean": round(float(np.mean(values)), digits), "quartile1": low, "median": middle, "quartile3": high}


def closeness(distances: np.ndarray, *, copy: float = 0.05) -> dict[str, float | int]:
    """Median, 5 % quantile and share below `copy` of distances to the nearest training picture."""
    if not len(distances):
        return {"count": 0}
    return {"count": len(distances), "median": round(float(np.median(distances)), 4), "quantile05": round(float(np.quantile(distances, 0.05)), 4),
            f"share_below_{copy:g}": round(float((distances < copy).mean()), 4)}
