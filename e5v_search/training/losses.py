"""Losses on raw (not yet normalised) embeddings. n rows, d columns; every loss is a mean over its rows.

In a run of several processes the candidates are everybody's rows (`gather`), and `offset` says where among them this
process's own begin: rank · n.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarities(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """(n, d), (m, d) -> (n, m): cosines times `scale`, one over the temperature."""
    return scale * _unit(a) @ _unit(b).T


def symmetric_info_nce(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """Row i of `a` belongs to row i of `b`; each is told from all rows of the other side, in both directions."""
    logits = similarities(a, b, scale)
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def hard_negative_info_nce(
    anchors: Tensor, positives: Tensor, negatives: Tensor, scale: Tensor | float, offset: int = 0
) -> Tensor:
    """Equation 1 of E5-V: each anchor against all positives and all hard negatives of the batch, one direction.

    anchors (n, d); positives (m, d), of which row `offset` + i belongs to anchor i; negatives (l, d), none allowed.
    """
    targets = offset + torch.arange(len(anchors), device=anchors.device)
    return retrieval(anchors, torch.cat((positives, negatives)), targets, scale)


def retrieval(queries: Tensor, gallery: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """Query i against the whole gallery (m, d), where row `targets[i]` is right and every other row wrong."""
    return F.cross_entropy(similarities(queries, gallery, scale), targets)


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """UniME's first stage: whom a row finds near, it is to find as the teacher does.

    KL(P_i ‖ Q_i), the student's distribution first as printed, P_i(j) = softmax_j(s_j · s_i / temperature) over all rows, i
    itself included, Q_i the teacher's. student (n, d), teacher (n, d') of the same texts; the teacher is a constant.
    """
    log_p, log_q = (similarities(x, x, 1 / temperature).log_softmax(dim=-1) for x in (student, teacher.detach()))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def instruction(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float = 0.02,
    beta: float = 0.1,
    k: int = 8,
    offset: int = 0,
) -> Tensor:
    """UniME's second stage: InfoNCE over a query's positive and its `k` hardest candidates that are no false negatives.

    queries (n, d); positives (m, d), of which row `offset` + i belongs to query i; negatives (l, d), none allowed.
    Candidates are all other positives and all negatives. Those with a cosine above cos(q, c⁺) + `beta` count as false
    negatives and are dropped. Fewer than `k` left are repeated from the hardest on; with none left the query costs
    nothing and has no gradient. The choice is a comparison, through which no gradient flows: the gradient is that of
    InfoNCE over the chosen.
    """
    cosines = similarities(queries, torch.cat((positives, negatives)), 1.0)
    own = offset + torch.arange(len(queries), device=queries.device)[:, None]
    right = cosines.gather(1, own)
    open_to_choice = (
        cosines.detach().masked_fill(cosines.detach() > right.detach() + beta, -torch.inf).scatter(1, own, -torch.inf)
    )
    hardest = open_to_choice.topk(min(k, cosines.shape[1]), dim=1)
    left = hardest.values.isfinite().sum(dim=1, keepdim=True)
    turns = torch.arange(k, device=queries.device) % left.clamp(min=1)
    wrong = cosines.gather(1, hardest.indices.gather(1, turns)).masked_fill(left == 0, -torch.inf)
    logits = torch.cat((right, wrong), dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.long, device=queries.device))


def soft_retrieval(queries: Tensor, gallery: Tensor, shares: Tensor, scale: Tensor | float) -> Tensor:
    """Query i against the gallery (m, d), of which row j is right by `shares[i, j]`; shares (n, m) are distributions."""
    return -(shares * similarities(queries, gallery, scale).log_softmax(dim=-1)).sum(dim=-1).mean()


def bag_of_words(hidden: Tensor, table: Tensor, words: Tensor, log_prior: Tensor | float) -> Tensor:
    """The embedding is to name its words: cross-entropy between softmax(hidden · tableᵀ + log_prior) and `words`.

    hidden (n, d); table (vocabulary, d), the input embeddings; words (n, vocabulary), each row a distribution;
    log_prior (vocabulary,): how common words are anyway. Without it all embeddings learn the same common words first,
    which makes them one direction: the contrastive part then starts from a collapse.
    """
    logits = hidden @ table.T + log_prior
    return -(words * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def next_token(hidden: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """Language modelling: the state before each token is to name it. hidden (n, d); table (vocabulary, d); tokens (n,)."""
    return F.cross_entropy(hidden @ table.T, tokens)


def _unit(x: Tensor) -> Tensor:
    # bfloat16 tells cosines near 1 apart by 1/256: a fifth, once divided by a temperature of 0.02
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
