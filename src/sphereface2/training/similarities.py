"""What a head sees of a batch, for the log: cosines, the loss's pull and push, norms."""

from __future__ import annotations

import torch

from sphereface2.data.dataset import Batch
from sphereface2.training.step import TrainingStep

HARDEST = 10
"""Negatives of a sample whose share of the push is told."""


def similarities(step: TrainingStep, batch: Batch) -> dict[str, float]:
    """Means over a batch, whose embeddings are computed as in evaluation; the host waits.

    Returns:
        ``positive_cosine``, ``negative_cosine`` and ``hardest_negative``: cosines with the own
        prototype, all others and the nearest other one; ``embedding_norm``; ``pull`` and ``push``:
        |∂L/∂cos θ_y| and Σ_{i≠y} |∂L/∂cos θ_i| of a sample, ``hard_push``: the share of the push
        that the `HARDEST` most pushed prototypes have; the head's ``bias`` and ``scale`` where it
        has one number of each.
    """
    network, head = step.network, step.head
    images, labels = batch.images.to(step.world.device), batch.labels.to(step.world.device)
    network.eval()
    with torch.no_grad(), torch.autocast(images.device.type, step.dtype, enabled=bool(step.dtype)):
        embeddings = network(network.preprocessing(images)).float()
    network.train()
    unit = torch.nn.functional.normalize(embeddings)
    cos = unit @ torch.nn.functional.normalize(head.weight.detach().float()).T
    own, count = labels[:, None], head.num_classes - 1
    positive = cos.gather(1, own)[:, 0]
    found = {
        "positive_cosine": positive.mean(),
        "negative_cosine": (cos.sum(1) - positive).mean() / count,
        "hardest_negative": cos.scatter(1, own, -1.0).amax(1).mean(),
        "embedding_norm": embeddings.norm(dim=1).mean(),
    }
    if (gradient := head.cosine_gradients(embeddings, labels)) is not None:
        size = gradient.abs()
        push = size.scatter(1, own, 0.0)
        most = push.topk(min(HARDEST, count), dim=1).values.sum(1)
        found |= {
            "pull": size.gather(1, own).mean(),
            "push": push.sum(1).mean(),
            "hard_push": (most / push.sum(1).clamp_min(1e-12)).mean(),
        }
    facts = {name: head.summary().get(name) for name in ("bias", "scale")}
    numbers = {name: float(value) for name, value in facts.items() if value is not None}
    return {name: value.item() for name, value in found.items()} | numbers
