"""The loss of one batch, part by part."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e5v_search.training import losses
from e5v_search.training.batches import Batch, Pictures
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.maps import Maps
from e5v_search.training.recipe import Recipe, Stage
from e5v_search.training.taught import Taught
from e5v_search.training.told import Teller, Told

_MAX_SCALE = 100.0  # as CLIP bounds it: beyond, the loss sees little but the hardest pair


class Objective(nn.Module):
    """The learned inverse temperature and the parts of the loss."""

    def __init__(
        self,
        recipe: Recipe,
        encoder: BatchEncoder,
        log_prior: Tensor,
        taught: Taught | None = None,
        maps: Maps | None = None,
        teller: Teller | None = None,
    ) -> None:
        super().__init__()
        self.teller = teller
        self.recipe, self.encoder, self.log_prior, self.taught, self.maps = recipe, encoder, log_prior, taught, maps
        if maps:
            self.head = nn.Linear(recipe.model.vision.width, maps.dim)  # from the tower's patches to the teacher's cells
        self.log_scale = nn.Parameter(torch.tensor(1 / recipe.temperature).log())

    def forward(self, batch: Batch, stage: Stage, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts that `stage` weighs and the batch brings, each a scalar."""
        weights = stage.weights
        scale = self.log_scale.exp().clamp(max=_MAX_SCALE)
        parts: dict[str, Tensor] = {}
        if weights.of_photos:
            parts |= self._photos(batch, stage, scale, generator)
        if weights.taught:
            parts["taught"] = self._taught(batch.sentences, generator)
        if batch.bare:
            hidden, tokens = self.encoder.bare_tokens(batch.bare)
            parts["language"] = losses.next_token(hidden, self.encoder.model.language_model.embed_tokens.weight, tokens)
        if batch.changes:
            parts |= self._scenes(batch, stage, scale, generator)
        if batch.told:
            parts["told"] = self._told(batch.told, stage, generator)
        if batch.triplets and weights.nli:
            sentences = [triplet[j] for j in range(3) for triplet in batch.triplets]
            anchors, positives, negatives = self.encoder.texts(sentences, "sts").chunk(3)
            parts["nli"] = losses.hard_negative_info_nce(anchors, positives, negatives, 1 / self.recipe.nli_temperature)
        return parts

    def total(self, parts: dict[str, Tensor], stage: Stage) -> Tensor:
        return torch.stack([getattr(stage.weights, name) * value for name, value in parts.items()]).sum()

    def _photos(self, batch: Batch, stage: Stage, scale: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        weights, table = stage.weights, self.encoder.model.language_model.embed_tokens.weight
        parts: dict[str, Tensor] = {}
        if weights.mapped:
            assert self.maps is not None
            assert isinstance(batch.photos, Tensor)
            patches, places = self.encoder.base_patches(batch.photos, stage.drop, generator, colour=stage.colour)
            vision = self.recipe.model.vision
            cells = self.maps.at(batch.rows, batch.boxes, places, vision.tile // vision.patch)
            parts["mapped"] = (1 - F.cosine_similarity(self.head(patches), cells, dim=-1)).mean()
            features = self.encoder.model.multi_modal_projector(patches)
        else:
            features = self._features(batch.photos, stage, generator)
        # a photo that is captioned is not named too: so more photos are seen for the same work
        n = len(batch.captions) // 2 if weights.captioning else len(batch.captions)
        if weights.pooled:
            pooled = torch.stack([one.mean(dim=0) for one in features[:n]])
            parts["pooled"] = self._seen(pooled, batch.rows[:n], generator)
        both_sides = weights.photos or weights.words or weights.answers
        if both_sides:
            images = self.encoder.pictures(features[:n])
        if weights.seen:
            some = min(n, stage.decoded or n)
            seen = images[:some] if both_sides else self.encoder.pictures(features[:some])
            parts["seen"] = self._seen(seen, batch.rows[:some], generator)
        if both_sides:
            captions = self.encoder.texts(batch.captions[:n])
        if weights.photos:
            parts["photos"] = losses.symmetric_info_nce(images, captions, scale)
        for name, prior in (("words", self.log_prior), ("answers", 0.0)):
            if getattr(weights, name):
                named = [losses.bag_of_words(h, table, batch.words[:n], prior) for h in (images, captions)]
                parts[name] = torch.stack(named).mean()
        if weights.captioning:
            answers = (
                self.encoder.caption_tokens(features[n:], batch.captions[n:]),
                self.encoder.paraphrase_tokens(batch.captions[n:], batch.others[n:]),
            )
            hidden, tokens = (torch.cat(some) for some in zip(*answers, strict=True))
            parts["captioning"] = losses.next_token(hidden, table, tokens)
        return parts

    def _seen(self, images: Tensor, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        """Photos against the teacher's targets of all captions, of which their own are right, half of it, and such as say
        nearly the same, the other half; and the other way, one caption of each against the batch's photos."""
        assert self.taught is not None
        scale, captions = 1 / self.recipe.teacher_temperature, self.taught.captions
        photos = torch.tensor(list(rows))
        own = (self.taught.owner == photos[:, None]).float()
        alike = (scale * self.taught.photos[photos] @ captions.T).softmax(dim=-1)
        shares = (own / own.sum(dim=-1, keepdim=True) + alike) / 2
        chosen = torch.multinomial(own, 1, generator=generator)[:, 0]
        back = losses.retrieval(captions[chosen], images, torch.arange(len(photos)), scale)
        return (losses.soft_retrieval(images, captions, shares, scale) + back) / 2

    def _taught(self, rows: Sequence[int], generator: torch.Generator) -> Tensor:
        """Sentences near the teacher's targets, and as near to those of the batch's other sentences as the teacher has them."""
        assert self.taught is not None
        targets = self.taught.targets[torch.tensor(list(rows))]
        prompts = "sts" if torch.rand((), generator=generator) < 0.5 else "retrieval"
        found = self.encoder.texts([self.taught.sentences[i] for i in rows], prompts)
        scale = 1 / self.recipe.teacher_temperature
        shares = (scale * targets @ targets.T).softmax(dim=-1)
        return losses.soft_retrieval(found, targets, shares, scale) + (1 - F.cosine_similarity(found, targets)).mean()

    def _scenes(self, batch: Batch, stage: Stage, scale: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        m = len(batch.scenes)
        before = self._features(batch.scenes, stage, generator, drawn=True)
        after = self._features(batch.changed, stage, generator, drawn=True)
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
        if stage.weights.pages:
            n = len(batch.pages)
            # the page's own prompt is that of any picture: a page is to lie where its text and what that describes lie
            pages = self.encoder.pictures(self._page_features(batch.pages, stage, generator), prompts)
            right = torch.arange(n, device=pages.device)
            found = [losses.retrieval(pages, gallery, right, scale) for gallery in (pictures.detach(), captions.detach())]
            parts["pages"] = torch.stack(found).mean()
        return parts

    def _told(self, told: Told, stage: Stage, generator: torch.Generator) -> Tensor:
        """Visual tokens near the words of what lies on their patch, told apart from all others that scenes use."""
        assert self.teller is not None
        patches, places = self.encoder.base_patches(told.pixels, stage.plain, generator, plain=True)
        shares = told.shares.gather(1, places[..., None].expand(-1, -1, told.shares.shape[-1]))
        asked = shares.sum(dim=-1) > 0
        words = self.teller.vectors(self.encoder.model.language_model.embed_tokens.weight.detach())
        tokens = self.encoder.model.multi_modal_projector(patches[asked])
        return losses.soft_retrieval(tokens, words, shares[asked], 1 / self.recipe.teacher_temperature)

    def _features(
        self, pictures: Pictures, stage: Stage, generator: torch.Generator, drawn: bool = False
    ) -> Tensor | list[Tensor]:
        if not isinstance(pictures, Tensor):
            return self.encoder.full_features(pictures)
        if drawn:
            return self.encoder.base_features(pictures, stage.plain, generator, plain=True)
        return self.encoder.base_features(pictures, stage.drop, generator, colour=stage.colour)

    def _page_features(self, pages: Pictures, stage: Stage, generator: torch.Generator) -> Tensor | list[Tensor]:
        if not isinstance(pages, Tensor):
            return self.encoder.full_features(pages)
        tiles = torch.cat(pages.chunk(2, dim=3))
        left, right = self.encoder.base_features(tiles, stage.plain, generator, plain=True).chunk(2)
        return torch.cat((left, right), dim=1)
