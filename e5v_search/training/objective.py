"""The loss of one batch, part by part."""

import torch
from torch import Tensor, nn

from e5v_search.training import losses
from e5v_search.training.batches import Batch, Pictures
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.recipe import Recipe, Stage

_MAX_SCALE = 100.0  # as CLIP bounds it: beyond, the loss sees little but the hardest pair


class Objective(nn.Module):
    """The learned inverse temperature and the parts of the loss."""

    def __init__(self, recipe: Recipe, encoder: BatchEncoder, log_prior: Tensor) -> None:
        super().__init__()
        self.recipe, self.encoder, self.log_prior = recipe, encoder, log_prior
        self.log_scale = nn.Parameter(torch.tensor(1 / recipe.temperature).log())

    def forward(self, batch: Batch, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts that `stage` weighs and the batch brings, each a scalar."""
        weights = stage.weights
        scale = self.log_scale.exp().clamp(max=_MAX_SCALE)
        parts = {}
        table = self.encoder.model.language_model.embed_tokens.weight
        if weights.photos or weights.words or weights.captioning:
            features = self._features(batch.photos, stage, generator)
        # a photo that is captioned is not named too: so more photos are seen for the same work
        n = len(batch.captions) // 2 if weights.captioning else len(batch.captions)
        if weights.photos or weights.words:
            images, captions = self.encoder.pictures(features[:n]), self.encoder.texts(batch.captions[:n])
            if weights.photos:
                parts["photos"] = losses.symmetric_info_nce(images, captions, scale)
            if weights.words:
                named = [losses.bag_of_words(h, table, batch.words[:n], self.log_prior) for h in (images, captions)]
                parts["words"] = torch.stack(named).mean()
        if weights.captioning:
            answers = (
                self.encoder.caption_tokens(features[n:], batch.captions[n:]),
                self.encoder.paraphrase_tokens(batch.captions[n:], batch.others[n:]),
            )
            hidden, tokens = (torch.cat(some) for some in zip(*answers, strict=True))
            parts["captioning"] = losses.next_token(hidden, table, tokens)
        if batch.bare:
            hidden, tokens = self.encoder.bare_tokens(batch.bare)
            parts["language"] = losses.next_token(hidden, table, tokens)
        if batch.changes and (weights.scenes or weights.changes):
            parts |= self._scenes(batch, stage, scale, generator)
        if batch.triplets and weights.nli:
            sentences = [triplet[j] for j in range(3) for triplet in batch.triplets]
            anchors, positives, negatives = self.encoder.texts(sentences, "sts").chunk(3)
            parts["nli"] = losses.hard_negative_info_nce(anchors, positives, negatives, 1 / self.recipe.nli_temperature)
        return parts

    def total(self, parts: dict[str, Tensor], stage: Stage) -> Tensor:
        return torch.stack([getattr(stage.weights, name) * value for name, value in parts.items()]).sum()

    def _scenes(self, batch: Batch, stage: Stage, scale: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        m = len(batch.scenes)
        # a few patches hold all of a scene: none may be dropped
        before = self._features(batch.scenes, stage, generator, drop=0.0)
        after = self._features(batch.changed, stage, generator, drop=0.0)
        # the gallery prompt of composed search and that of plain search are to give one space
        prompts = "cirr" if torch.rand((), generator=generator) < 0.5 else "retrieval"
        pictures = self.encoder.pictures([*before, *after], prompts)
        captions = self.encoder.texts(batch.scene_captions + batch.changed_captions)
        parts = {"scenes": losses.symmetric_info_nce(pictures, captions, scale)}
        if stage.weights.changes:
            composed = self.encoder.composed(before, batch.changes)
            # the unchanged picture stays in the gallery: it is the nearest wrong answer
            targets = torch.arange(m, 2 * m, device=composed.device)
            by_picture, by_caption = (losses.retrieval(composed, g, targets, scale) for g in (pictures, captions))
            parts["changes"] = (by_picture + by_caption) / 2
        return parts

    def _features(
        self, pictures: Pictures, stage: Stage, generator: torch.Generator, drop: float | None = None
    ) -> Tensor | list[Tensor]:
        if isinstance(pictures, Tensor):
            return self.encoder.base_features(pictures, stage.drop if drop is None else drop, generator)
        return self.encoder.full_features(pictures)
