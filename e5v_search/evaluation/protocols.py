"""The protocols of the paper's code (kongds/E5-V), to the letter: what is embedded with which prompt, what counts as found.

Each has a prompt set of its own; `prompts` takes the place of it, as `prompts.own_set` says.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from e5v_search.evaluation.gap import modality_gap
from e5v_search.evaluation.metrics import Outcome, Part, Ranked, Rated
from e5v_search.evaluation.ranks import positive_ranks, ranks_both_ways, top
from e5v_search.evaluation.records import Captioned, Change, Composed, Drawn, Missing, Rating, Scenes, absent
from e5v_search.evaluation.vectors import Vectors
from e5v_search.prompts import own_set
from e5v_search.render import render

D = TypeVar("D", Captioned, Composed)

CIRR_KS, SUBSET_KS, FASHION_KS = (1, 5, 10, 50), (1, 2, 3), (10, 50)
SUBMITTED, SUBMITTED_OF_SUBSET = 50, 3  # the lengths of the lists that CIRR's server takes


def gallery(data: D, vectors: Vectors, prompts: str, missing: Missing) -> tuple[D, np.ndarray]:
    """The data without the pictures that cannot be used, if that is allowed, and the vectors (m, dim) of the others."""
    gone = absent(data.gallery)
    missing.add(data.gallery, gone)
    data = data.without(gone)
    xb, bad = vectors.pictures(data.gallery, prompts)
    missing.add(data.gallery, bad)
    return data.without(bad), np.delete(xb, list(bad), axis=0)


def captioned(
    data: Captioned, vectors: Vectors, missing: Missing, prompts: str | None = None, *, rendered: bool = False
) -> tuple[Outcome, Captioned]:
    """Text to image (the paper's "image retrieval") and image to text, and what was used of the data.

    With `rendered` it is the paper's image-image retrieval: captions are drawn as pictures and embedded as pictures are.
    """
    prompts = own_set(prompts, "retrieval")
    data, xi = gallery(data, vectors, prompts, missing)
    texts = [caption.text for caption in data.captions]
    if rendered:
        pages = [Drawn(text, partial(render, text)) for text in texts]
        xt, bad = vectors.pictures(pages, prompts)
        missing.add(pages, bad)
        data = Captioned(data.gallery, tuple(c for i, c in enumerate(data.captions) if i not in bad))
        xt = np.delete(xt, list(bad), axis=0)
    else:
        xt = vectors.texts(texts, prompts)
    t2i, i2t = ranks_both_ways(xt, xi, [caption.owners for caption in data.captions])
    asked = i2t[:, 0] > 0  # a picture without captions asks nothing, but is there to be found
    parts: dict[str, Part] = {"t2i": Ranked(t2i), "i2t": Ranked(i2t[asked])}
    gap = modality_gap(xi, xt) if min(len(xi), len(xt)) > 1 else None
    return Outcome(parts, gap=gap), data


def cirr(data: Composed, vectors: Vectors, missing: Missing, prompts: str | None = None) -> tuple[Outcome, Composed]:
    """Recall@1/5/10/50 over the split, Recall_subset@1/2/3 within the query's own set; the reference is never an answer."""
    data, xq, xb = _embedded(data, vectors, own_set(prompts, "cirr"), missing)
    targets, references = _targets(data), [(q.reference,) for q in data.queries]
    parts: dict[str, Part] = {"": Ranked(positive_ranks(xq, xb, targets, references), CIRR_KS)}
    if all(q.members for q in data.queries):
        parts["subset"] = Ranked(_subset_ranks(data, xq, xb), SUBSET_KS, recalls_only=True)
    return Outcome(parts), data


def cirr_submission(
    data: Composed, vectors: Vectors, missing: Missing, prompts: str | None = None
) -> tuple[dict[str, dict[str, Any]], Composed]:
    """What CIRR's server is given for the test split, whose targets are secret: the two files by the metric they are for."""
    data, xq, xb = _embedded(data, vectors, own_set(prompts, "cirr"), missing)
    best = top(xq, xb, min(SUBMITTED, len(xb) - 1), [(q.reference,) for q in data.queries])
    names = [source.name for source in data.gallery]
    files = {"recall": {q.key: [names[i] for i in row] for q, row in zip(data.queries, best, strict=True)}}
    if all(q.members for q in data.queries):
        within = [
            top(xq[i : i + 1], xb[list(q.members)], min(SUBMITTED_OF_SUBSET, len(q.members)), [()])[0]
            for i, q in enumerate(data.queries)
        ]
        files["recall_subset"] = {
            q.key: [names[q.members[i]] for i in row] for q, row in zip(data.queries, within, strict=True)
        }
    return {metric: {"version": "rc2", "metric": metric} | answers for metric, answers in files.items()}, data


def fashioniq(
    data: Mapping[str, Composed], vectors: Vectors, missing: Missing, prompts: str | None = None
) -> tuple[Outcome, dict[str, Composed]]:
    """Recall@10/50 in each category's own gallery, and their means; the reference stays in the gallery, as a wrong answer.

    Each category has its own set, of which toptee's says "shirt", as the paper's code does.
    """
    parts: dict[str, Part] = {}
    used = {}
    for category, part in data.items():
        name = own_set(prompts, f"fashioniq-{category}")
        used[category], xb = gallery(part, vectors, name, missing)
        xq = _both_orders(used[category], vectors, name)
        parts[category] = Ranked(positive_ranks(xq, xb, _targets(used[category])), FASHION_KS)
    averages = {f"average_r@{k}": tuple(f"{category}_r@{k}" for category in parts) for k in FASHION_KS}
    return Outcome(parts, averages), used


def sts(data: Rating, vectors: Vectors, missing: Missing, prompts: str | None = None) -> tuple[Outcome, Rating]:
    """Spearman over all pairs of a task, its subsets joined into one list ("all"), and the mean over the tasks.

    The paper's code averages values that it has rounded to two digits; here they are not.
    """
    prompts = own_set(prompts, "sts")
    parts: dict[str, Part] = {}
    for task, pairs in data.tasks.items():
        sides = [pair.a for pair in pairs], [pair.b for pair in pairs]
        a, b = (vectors.texts([sts_sentence(text) for text in side], prompts) for side in sides)
        parts[task] = Rated((a * b).sum(axis=1), np.array([pair.gold for pair in pairs]))
    return Outcome(parts, {"average": tuple(parts)}), data


def scenes(data: Scenes, vectors: Vectors, missing: Missing, prompts: str | None = None) -> tuple[Outcome, Scenes]:
    """The four protocols on drawn pictures: text-image ("t2i", "i2t"), the same with drawn captions ("rendered_..."), composed
    by CIRR's rules, and STS. Each has its own set."""
    plain, _ = captioned(data.captioned, vectors, missing, prompts)
    drawn, _ = captioned(data.captioned, vectors, missing, prompts, rendered=True)
    changed, _ = cirr(data.composed, vectors, missing, prompts)
    rated, _ = sts(data.rating, vectors, missing, prompts)
    parts = {
        **plain.parts,
        **{f"rendered_{name}": part for name, part in drawn.parts.items()},
        "composed": changed.parts[""],
        **rated.parts,
    }
    return Outcome(parts, gap=plain.gap), data


def sts_sentence(sentence: str) -> str:
    """A sentence as the paper's code hands it to the model: with a full stop, single quotes, and no question at its end."""
    sentence = " ".join(sentence.split())
    if sentence and sentence[-1] not in ".?\"'":
        sentence += "."
    sentence = sentence.replace('"', "'")
    return sentence[:-1] + "." if sentence.endswith("?") else sentence


def fashion_text(captions: Sequence[str]) -> str:
    """FashionIQ's captions of one change as one text."""
    return ", ".join(caption.strip(".?, ") for caption in captions)


def _embedded(data: Composed, vectors: Vectors, prompts: str, missing: Missing) -> tuple[Composed, np.ndarray, np.ndarray]:
    """What can be used of CIRR's data, and the vectors of its queries and of its gallery."""
    data, xb = gallery(data, vectors, prompts, missing)
    return data, vectors.composed([(data.gallery[q.reference], q.texts[0]) for q in data.queries], prompts), xb


def _both_orders(data: Composed, vectors: Vectors, prompts: str) -> np.ndarray:
    """The two orders of a query's captions, their raw vectors added, the sum normalised -> (n, dim)."""

    pairs = [(data.gallery[q.reference], fashion_text(q.texts[::turn])) for turn in (1, -1) for q in data.queries]
    raw = vectors.composed(pairs, prompts, normalise=False)
    x = raw[: len(data.queries)] + raw[len(data.queries) :]
    out: np.ndarray = x / np.linalg.norm(x, axis=1, keepdims=True)
    return out


def _subset_ranks(data: Composed, xq: np.ndarray, xb: np.ndarray) -> np.ndarray:
    """Rank (n, 1) of each query's target among the members of its set."""
    ranks = [
        positive_ranks(xq[i : i + 1], xb[list(q.members)], [(q.members.index(_known(q)),)]) for i, q in enumerate(data.queries)
    ]
    return np.concatenate(ranks)


def _targets(data: Composed) -> list[tuple[int]]:
    return [(_known(query),) for query in data.queries]


def _known(query: Change) -> int:
    if query.target is None:
        raise ValueError(f"the target of query {query.key} is secret")
    return query.target
