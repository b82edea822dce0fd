"""k-means with clusters of equal size."""

from __future__ import annotations

import torch


def balanced_k_means(
    features: torch.Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 10
) -> torch.Tensor:
    """
    Assign each point to one of `num_clusters` clusters of exactly equal size, near its centre.

    Lloyd's iterations; the assignment takes (point, cluster) pairs by rising distance while the cluster has room.

    Args:
        features (`torch.FloatTensor` of shape `(points, features)`): `points` must be a multiple of `num_clusters`.
        num_clusters (`int`): How many clusters.
        generator (`torch.Generator`): Chooses the first centres.
        iterations (`int`, defaults to 10): Rounds at most; stops when nothing moves.

    Returns:
        `torch.LongTensor` of shape `(points,)`: cluster numbers.
    """
    points = len(features)
    centres = features[torch.randperm(points, generator=generator)[:num_clusters]]
    labels = torch.full((points,), -1)
    for _ in range(iterations):
        assigned = _fill_by_distance(torch.cdist(features, centres), points // num_clusters)
        if torch.equal(assigned, labels):
            break
        labels = assigned
        centres = torch.stack([features[labels == cluster].mean(dim=0) for cluster in range(num_clusters)])
    return labels


def _fill_by_distance(distance: torch.Tensor, capacity: int) -> torch.Tensor:
    points, clusters = distance.shape
    labels, room = [-1] * points, [capacity] * clusters
    for pair in distance.flatten().argsort(stable=True).tolist():
        point, cluster = divmod(pair, clusters)
        if labels[point] < 0 and room[cluster]:
            labels[point] = cluster
            room[cluster] -= 1
    return torch.tensor(labels)
