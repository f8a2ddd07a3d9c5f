"""From logits to probabilities, and from scores to the best classes."""

from __future__ import annotations

import numpy as np


def probabilities(logits: np.ndarray) -> np.ndarray:
    """float32 (..., classes) -> float32, softmax over the classes"""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def best(scores: np.ndarray, top_k: int) -> np.ndarray:
    """float32 (B, classes) -> int64 (B, top_k): the largest first, equal ones in their order"""
    classes = scores.shape[-1]
    if not 0 < top_k < classes // 2:
        return np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    rows = []  # for a few of many, only what is no less than the last of them is sorted
    least = np.partition(scores, classes - top_k, axis=-1)[:, classes - top_k]
    for row, bound in zip(scores, least, strict=True):
        candidates = np.flatnonzero(row >= bound)
        rows.append(candidates[np.argsort(-row[candidates], kind="stable")[:top_k]])
    return np.array(rows, dtype=np.int64).reshape(len(scores), top_k)
