"""Losses on raw (not yet normalised) embeddings. n rows, d columns; every loss is a mean over its rows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarities(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """(n, d), (m, d) -> (n, m): cosines times `scale`, one over the temperature."""
    return scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def symmetric_info_nce(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Row i of `a` belongs to row i of `b`; each is told from all rows of the other side, in both directions."""
    logits = similarities(a, b, scale)
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def hard_negative_info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, scale: Tensor | float) -> Tensor:
    """Equation 1 of E5-V: each anchor against all positives and all hard negatives of the batch, one direction."""
    logits = similarities(anchors, torch.cat((positives, negatives)), scale)
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def retrieval(queries: Tensor, gallery: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """Query i against the whole gallery (m, d), where row `targets[i]` is right and every other row wrong."""
    return F.cross_entropy(similarities(queries, gallery, scale), targets)


def bag_of_words(hidden: Tensor, table: Tensor, words: Tensor, log_prior: Tensor) -> Tensor:
    """The embedding is to name its words: cross-entropy between softmax(hidden · tableᵀ + log_prior) and `words`.

    hidden (n, d); table (vocabulary, d), the input embeddings; words (n, vocabulary), each row a distribution;
    log_prior (vocabulary,): how common words are anyway. Without it all embeddings learn the same common words first,
    which makes them one direction: the contrastive part then starts from a collapse.
    """
    logits = hidden @ table.T + log_prior
    return -(words * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
