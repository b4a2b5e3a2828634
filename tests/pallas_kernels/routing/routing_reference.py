"""Routing in float64 NumPy, token by token."""

import numpy as np


def route(
    logits, *, top_k, score="softmax", bias=None, groups=None, threshold=None, normalize=True, scale=1.0, capacity=None
):
    """(experts, weights, group_sizes, permutation, inverse, scores), as lists of plain loops give them."""
    logits = np.asarray(logits, np.float64)
    tokens, number = logits.shape
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = shifted / shifted.sum(axis=1, keepdims=True) if score == "softmax" else 1 / (1 + np.exp(-logits))
    biased = scores + (0 if bias is None else np.asarray(bias, np.float64))
    experts, weights = np.full((tokens, top_k), number), np.zeros((tokens, top_k))
    for n in range(tokens):
        allowed = list(range(number))
        if groups is not None:
            parts = np.split(np.arange(number), groups[0])
            best = sorted(range(groups[0]), key=lambda g: -np.sort(biased[n, parts[g]])[-2:].sum())  # sorted is stable
            allowed = sorted(e for g in best[: groups[1]] for e in parts[g])
        chosen = sorted(allowed, key=lambda e: -biased[n, e])[:top_k]
        chosen = [e for e in chosen if threshold is None or biased[n, e] >= threshold]
        experts[n, : len(chosen)] = chosen
        weights[n, : len(chosen)] = scores[n, chosen]
        if normalize and chosen:
            weights[n] /= weights[n].sum()
    weights *= scale
    queues = [[] for _ in range(number + 1)]
    for assignment, e in enumerate(experts.reshape(-1)):
        full = capacity is not None and e < number and len(queues[e]) >= capacity
        queues[number if full else e].append(assignment)
    for assignment in queues[number]:
        experts.reshape(-1)[assignment] = number
        weights.reshape(-1)[assignment] = 0
    permutation = np.array([a for queue in queues for a in queue])
    return experts, weights, np.array([len(q) for q in queues[:-1]]), permutation, np.argsort(permutation), scores
