"""A training recipe as a value: what is trained, on what, how long. Defaults are those of a small from-scratch run."""

from dataclasses import dataclass, field
from typing import Literal

from e5v_search.backbones.config import LlavaNextConfig, TextConfig, VisionConfig
from e5v_search.backbones.tiles import Size, TileSpec


@dataclass(frozen=True)
class Vision:
    """CLIP vision tower: `layers` counts those that run; the checkpoint gets one more, which LLaVA-NeXT never reads."""

    width: int = 256
    layers: int = 6
    heads: int = 4
    mlp: int = 1024
    tile: int = 112
    patch: int = 16


@dataclass(frozen=True)
class Decoder:
    """LLaMA decoder."""

    width: int = 256
    layers: int = 5
    heads: int = 4
    mlp: int = 704
    vocabulary: int = 8192
    positions: int = 2048


@dataclass(frozen=True)
class Model:
    vision: Vision = field(default_factory=Vision)
    decoder: Decoder = field(default_factory=Decoder)
    pinpoints: tuple[tuple[int, int], ...] = ((112, 224), (224, 112), (224, 224))

    def problems(self) -> list[str]:
        found = []
        if self.vision.tile % self.vision.patch:
            found.append(f"vision.tile: {self.vision.tile} is no multiple of vision.patch, {self.vision.patch}")
        for name, part in (("vision", self.vision), ("decoder", self.decoder)):
            if part.width % part.heads or part.width // part.heads % 2:
                found.append(f"{name}.width: {part.width} does not split into {part.heads} heads of even width")
        if any(h % self.vision.tile or w % self.vision.tile for h, w in self.pinpoints) or not self.pinpoints:
            found.append(f"pinpoints: one or more, each side a multiple of vision.tile, {self.vision.tile}")
        return found

    def config(self, image_token_id: int) -> LlavaNextConfig:
        v, d = self.vision, self.decoder
        return LlavaNextConfig(
            VisionConfig(v.width, v.mlp, v.layers + 1, v.heads, v.tile, v.patch, hidden_act="gelu"),
            TextConfig("llama", d.vocabulary, d.width, d.mlp, d.layers, d.heads, max_position_embeddings=d.positions),
            self.pinpoints,
            image_token_id,
        )

    def tiles(self) -> TileSpec:
        pinpoints: tuple[Size, ...] = self.pinpoints
        return TileSpec(self.vision.tile, self.vision.patch, pinpoints)


@dataclass(frozen=True)
class Optimiser:
    """`rate` is reached after `warmup` steps; each stage says what becomes of it."""

    kind: Literal["adamw", "muon"] = "adamw"
    rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.1
    beta2: float = 0.98
    clip: float = 1.0


@dataclass(frozen=True)
class Weights:
    """Of the parts of the loss. A part with weight 0 costs nothing."""

    photos: float = 1.0
    words: float = 0.0
    scenes: float = 0.0
    changes: float = 0.0
    nli: float = 0.0
    language: float = 0.0  # next tokens of bare sentences
    captioning: float = 0.0  # next tokens of what a photo, or another of its captions, is summed up in
    answers: float = 0.0  # as `words`, by the state alone: the next token, drawn from the captions' words by rarity
    taught: float = 0.0  # sentences, drawn to what the teacher makes of them
    seen: float = 0.0  # photos, drawn to what the teacher makes of their captions
    pooled: float = 0.0  # the same of the mean of a photo's visual tokens, without the decoder
    mapped: float = 0.0  # patches of photos, drawn to what the picture teacher sees there
    told: float = 0.0  # patches of drawings and pages, drawn to the words of what lies there
    pages: float = 0.0  # rendered captions, drawn to the captions and to what these describe

    @property
    def of_photos(self) -> float:
        return self.photos + self.words + self.answers + self.captioning + self.seen + self.pooled + self.mapped


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps on the base tile alone, or in the full AnyRes layout."""

    name: str
    steps: int
    rate: tuple[float, float] = (1.0, 1.0)  # first and last step's share of the optimiser's rate; linear between
    layout: Literal["base", "full"] = "base"
    photos: int = 128  # photo-caption pairs per step
    scenes: int = 24  # scenes per step, each with a change
    triplets: int = 32
    bare: int = 32  # sentences by themselves, for `language`
    sentences: int = 128  # for the teacher's part
    pages: int = 16
    told: int = 64  # tiles of drawings and pages for `told`
    decoded: int = 0  # how many of the photos go through the decoder for `seen`; 0: all
    aside_every: int = 1  # scenes and triplets join every so many steps
    taught_words: bool = False  # begin with the teacher's word vectors in the place of the model's own
    taught_projector: bool = (
        False  # begin with the projector whose visual tokens come nearest to such words, by ridge regression
    )
    freeze_vision: bool = False  # the vision tower alone; the projector learns on
    drop: float = 0.0  # share of a photo's patches left out, before the vision tower
    plain: float = 0.0  # of drawings and pages that share is left out which shows least; they are mostly background
    colour: float = 0.0  # how far brightness, contrast and saturation of photos stray; 0: not at all
    crop: float = 0.5  # smallest share of the photo that a random crop keeps; 1: no crops
    weights: Weights = field(default_factory=Weights)

    @property
    def asks_teacher(self) -> bool:
        return self.taught_words or self.taught_projector or self.weights.taught + self.weights.seen + self.weights.pooled > 0

    def problems(self) -> list[str]:
        counts = ("steps", "photos", "scenes", "triplets", "bare", "sentences", "pages", "told", "aside_every")
        found = [f"{k}: must be positive" for k in counts if getattr(self, k) < 1]
        found += [f"{k}: must lie in [0, 1)" for k in ("drop", "plain", "colour") if not 0 <= getattr(self, k) < 1]
        if not 0 < self.crop <= 1:
            found.append("crop: must lie in (0, 1]")
        if self.weights.captioning and self.photos < 2:
            found.append("photos: two at least, one to name and one to caption")
        if self.layout == "full" and self.weights.mapped:
            found.append("weights.mapped: only on the base tile")
        if self.layout == "full" and (self.drop or self.plain):
            found.append("drop, plain: only on the base tile; a full layout keeps all its patches")
        return found


@dataclass(frozen=True)
class Recipe:
    name: str
    stages: tuple[Stage, ...]
    seed: int = 0
    temperature: float = 0.07  # at the start; learned from there
    nli_temperature: float = 0.05
    teacher: str = ""  # a text model, as `teacher_vectors` knows it; for the parts "taught", "seen" and "pooled"
    teacher_temperature: float = 0.05
    picture_teacher: str = ""  # an image classifier, as `teacher_maps` knows it; for the part "mapped"
    save_every: int = 100  # steps
    evaluate_every: int = 200
    held_out_scenes: int = 500  # of the last measurement; those on the way make do with a fifth
    model: Model = field(default_factory=Model)
    optimiser: Optimiser = field(default_factory=Optimiser)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of the optimiser step `step`, counted from 0 over all stages."""
        return self._locate(step)[0]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: the stage's share of the optimiser's, less during warm-up."""
        stage, done = self._locate(step)
        first, last = stage.rate
        share = first + (last - first) * done / max(1, stage.steps - 1)
        return self.optimiser.rate * share * min(1.0, (step + 1) / self.optimiser.warmup)

    def begins(self, step: int) -> bool:
        """Whether a stage begins with this step."""
        return self._locate(step)[1] == 0

    def _locate(self, step: int) -> tuple[Stage, int]:
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError("step beyond the last stage")

    def problems(self) -> list[str]:
        found = [] if self.stages else ["stages: one at least"]
        if not self.teacher and any(s.asks_teacher for s in self.stages):
            found.append("teacher: none is named, but a stage weighs taught, seen or pooled")
        if not self.picture_teacher and any(s.weights.mapped for s in self.stages):
            found.append("picture_teacher: none is named, but a stage weighs mapped")
        positive = ("temperature", "nli_temperature", "teacher_temperature", "save_every", "evaluate_every", "held_out_scenes")
        return found + [f"{k}: must be positive" for k in positive if getattr(self, k) <= 0]
