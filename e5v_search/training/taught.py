"""What a larger text model, the teacher, makes of the training sentences: constants that a stage draws the model to.

Teacher and model meet in the strongest directions of the teacher's captions and words, as many as the model is wide. Of a
target only the direction counts, so that targets compare by the teacher's own cosines, or nearly.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from e5v_search.training.data import Photos, Triplet
from e5v_search.training.teacher import teacher_vectors

_LONGEST = 32  # tokens; few sentences are longer, and these cost the most
_AGAIN = 4  # times that a sentence given by itself occurs: they are few, and more like what people compare than captions are
_OTHERS = 24_000  # NLI sentences: as many as a run of an hour comes to see


@dataclass(frozen=True)
class Taught:
    """`targets` (n, d) of `sentences`, unit rows. The first `len(owner)` are the captions of the photos, of which `owner`
    tells the photo; `photos` (photos, d) are the mean of each one's captions. `words` (vocabulary, d): single tokens."""

    sentences: list[str]
    targets: Tensor
    owner: Tensor
    photos: Tensor
    words: Tensor

    @property
    def captions(self) -> Tensor:
        return self.targets[: len(self.owner)]


def load_taught(
    photos: Photos,
    triplets: Sequence[Triplet],
    sentences: list[str],
    tokenizer: Tokenizer,
    width: int,
    teacher: str,
    folder: Path,
    say: Callable[[str], None],
) -> Taught:
    """Ask the teacher about captions, NLI sentences and the words of the vocabulary, once: the answers stay in `folder`."""
    captions = [caption for own in photos.captions for caption in own]
    other = sorted({sentence for triplet in triplets for sentence in triplet})
    random.Random(0).shuffle(other)
    short = [s for s, e in zip(other, tokenizer.encode_batch(other), strict=True) if len(e.ids) <= _LONGEST][:_OTHERS]
    words = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
    texts = [*captions, *short, *sentences * _AGAIN]
    vectors = torch.from_numpy(np.array(teacher_vectors([*texts, *words], teacher, folder, say), dtype=np.float32))
    owner = torch.tensor([photo for photo, own in enumerate(photos.captions) for _ in own])
    return taught(texts, vectors[: len(texts)], owner, vectors[len(texts) :], width)


def taught(sentences: list[str], vectors: Tensor, owner: Tensor, words: Tensor, width: int) -> Taught:
    """From the teacher's vectors (n, d') of sentences and (vocabulary, d') of words."""
    broad = torch.cat((vectors[: len(owner)], words))
    directions = torch.linalg.eigh(broad.T @ broad).eigenvectors.flip(1)[:, :width]
    # the largest entry of each decides its sign, which is up to chance otherwise
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    bridge = F.pad(directions, (0, width - directions.shape[1]))
    targets = F.normalize(vectors @ bridge, dim=-1)
    sums = torch.zeros(int(owner.max()) + 1, width).index_add_(0, owner, targets[: len(owner)])
    # what all words share says nothing about one
    return Taught(sentences, targets, owner, F.normalize(sums, dim=-1), F.normalize((words - words.mean(0)) @ bridge, dim=-1))
