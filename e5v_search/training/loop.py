"""The run, in the order in which it happens: data, tokenizer, model, steps, measurements, checkpoint folder."""

import hashlib
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.errors import ModelError
from e5v_search.parallel import ahead, windows
from e5v_search.scenes import random_change, random_scene
from e5v_search.training.batches import Batch, Batches
from e5v_search.training.data import Photos, Triplet, caption_corpus, load_photos, read_triplets, sts_sentences
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.export import export
from e5v_search.training.initialise import (
    initialise,
    initialise_head,
    initialise_patches,
    initialise_taught_projector,
    initialise_taught_words,
    initialise_words,
)
from e5v_search.training.log import Log, OnStep, Say
from e5v_search.training.maps import load_maps
from e5v_search.training.measure import RunEmbedder, photo_recalls, scene_recalls, sts_file, sts_spearman
from e5v_search.training.muon import Muon
from e5v_search.training.objective import Objective
from e5v_search.training.recipe import Optimiser, Recipe, Stage
from e5v_search.training.state import load_state, save_state
from e5v_search.training.taught import load_taught
from e5v_search.training.tokenizer import IMAGE, train_tokenizer

_PHOTO_SIDE = 224
_REGRESSED = 500  # photos, as many patches each


@dataclass(frozen=True)
class Data:
    photos: Photos  # training split
    held_out: Photos  # development split: measured, never trained on
    triplets: list[Triplet]
    sts: Path | None = None
    sentences: list[str] = field(default_factory=list)  # by themselves, for the teacher's part


def load_data(folder: Path, limit: int | None = None) -> Data:
    """The shared data folder: Flickr8k's train and dev photos, NLI triplets, and of STS-B the dev pairs and the training
    sentences, when they are there."""
    flickr, sts = folder / "flickr8k", sts_file(folder, "dev")
    trained = sts_file(folder, "train")
    return Data(
        load_photos(flickr, "train", _PHOTO_SIDE, limit),
        load_photos(flickr, "dev", _PHOTO_SIDE, limit),
        read_triplets(folder / "nli" / "nli_triplets.csv")[:limit],
        sts if sts.exists() else None,
        sts_sentences(trained.parent)[:limit] if trained.exists() else [],
    )


def train(recipe: Recipe, data: Data, out: Path, say: Say, on_step: OnStep | None = None, board: bool = False) -> Path:
    """Run `recipe` to its end, going on from what `out` holds; the finished checkpoint folder.

    Writes into `out`: tokenizer.json, state.safetensors (all that a resumed run needs), log.jsonl, model/.
    Raises ModelError naming step and part when a loss is not finite.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, data, out / "tokenizer.json")
    torch.manual_seed(recipe.seed)
    model = LlavaNext(recipe.model.config(tokenizer.encode(IMAGE, add_special_tokens=False).ids[0]))
    initialise(model, torch.Generator().manual_seed(recipe.seed))
    text = model.config.text_config
    encoder = BatchEncoder(model, PromptEncoder(tokenizer, text.wording, text.max_tokens))
    taught = None
    if recipe.teacher:
        width = recipe.model.decoder.width
        taught = load_taught(data.photos, data.triplets, data.sentences, tokenizer, width, recipe.teacher, out / "teacher", say)
    maps = load_maps(data.photos, recipe.picture_teacher, out / "teacher", say) if recipe.picture_teacher else None
    batches = Batches(recipe, data.photos, data.triplets, tokenizer, len(taught.sentences) if taught else 0)
    initialise_words(model, batches.words)
    initialise_patches(model, encoder.normalised(torch.from_numpy(data.photos.pixels[:500])))
    objective = Objective(recipe, encoder, batches.log_prior, taught, maps, batches.teller)
    trained = nn.ModuleDict({"model": model, "objective": objective})
    optimiser = _optimiser(trained, recipe.optimiser)
    # not the stages: a run may be made longer or shorter than planned, from where it is
    same = (recipe.seed, recipe.model, recipe.optimiser, len(data.photos), len(data.triplets))
    identity = hashlib.sha256(repr(same).encode()).hexdigest()
    state = out / "state.safetensors"
    learned = dict(trained.named_parameters())
    first = load_state(state, learned, optimiser, identity) if state.exists() else 0
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters:,} parameters, {len(data.photos):,} photos, steps {first} to {recipe.steps}")

    log = Log(out / "log.jsonl", first, recipe.steps, say, on_step=on_step, board=out / "board" if board else None, unit="rows")
    # one thread draws and crops the next batches while the model works on this one
    for step, batch in enumerate(ahead(batches.make, range(first, recipe.steps), workers=1, depth=3), first):
        stage, rate = recipe.stage_at(step), recipe.rate_at(step)
        if recipe.begins(step):
            begin(stage, objective, batches)
        parts = _step(objective, optimiser, batch, recipe, step, rate)
        rows = len(batch.captions) + len(batch.sentences) + len(batch.scenes)
        log.step(step, stage.name, {k: float(v.detach()) for k, v in parts.items()}, rate, rows)
        done = step + 1
        if done % recipe.evaluate_every == 0 and done < recipe.steps:
            log.measured(done, measure(encoder, data, recipe, stage.layout, quick=True))
        if done % recipe.save_every == 0 or done == recipe.steps:
            save_state(state, learned, optimiser, done, identity)
    export(model, tokenizer, out / "model")
    log.measured(recipe.steps, measure(encoder, data, recipe, recipe.stages[-1].layout, quick=False))
    return out / "model"


def begin(stage: Stage, objective: Objective, batches: Batches) -> None:
    """What a stage starts with in the place of what was learned: the teachers' words, and linear maps to what they say."""
    encoder, taught = objective.encoder, objective.taught
    if taught and stage.taught_words:
        initialise_taught_words(encoder.model, taught.words, encoder.prompt_tokens())
    if taught and stage.taught_projector:
        pieces = windows(range(len(taught.photos)), 64)
        with torch.no_grad():
            patches = [encoder.base_patches(batches.whole(rows))[0] for rows in pieces]
        initialise_taught_projector(encoder.model, patches, taught.photos)
    # only once: later stages go on with what the head has learned
    if objective.maps and stage is next((s for s in objective.recipe.stages if s.weights.mapped), None):
        rows = range(min(_REGRESSED, len(batches.photos)))
        with torch.no_grad():
            found, places = encoder.base_patches(batches.whole(rows))
        cells = objective.maps.at(
            rows, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(rows), 4), places, math.isqrt(places.shape[1])
        )
        initialise_head(objective.head, found.flatten(0, 1), cells.flatten(0, 1))


def _tokenizer(recipe: Recipe, data: Data, path: Path) -> Tokenizer:
    if not path.exists():
        rng = random.Random(recipe.seed)
        scenes = [random_scene(rng) for _ in range(2000)]
        sentences = [scene.caption(rng) for scene in scenes] + [random_change(scene, rng)[0] for scene in scenes]
        corpus = caption_corpus(data.photos.captions, data.triplets) + sentences
        train_tokenizer(corpus, recipe.model.decoder.vocabulary).save(str(path))
    return Tokenizer.from_file(str(path))


def _optimiser(module: nn.Module, o: Optimiser) -> torch.optim.Optimizer:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        decays = parameter.dim() >= 2 and "embed" not in name
        (matrices if decays else others).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": o.decay}, {"params": others, "weight_decay": 0.0}]
    if o.kind == "muon":
        groups[0]["orthogonal"] = True
        return Muon(groups, lr=o.rate, betas=(0.9, o.beta2))
    return torch.optim.AdamW(groups, lr=o.rate, betas=(0.9, o.beta2), fused=True)


def _step(
    objective: Objective, optimiser: torch.optim.Optimizer, batch: Batch, recipe: Recipe, step: int, rate: float
) -> dict[str, Tensor]:
    stage = recipe.stage_at(step)
    # chance depends on the step alone: a resumed run draws what an uninterrupted one would
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    objective.encoder.model.vision_tower.requires_grad_(not stage.freeze_vision)
    parts: dict[str, Tensor] = objective(batch, stage, generator)
    for name, value in parts.items():
        _finite(value, f"loss {name!r}", step, stage)
    optimiser.zero_grad(set_to_none=True)
    objective.total(parts, stage).backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, recipe.optimiser.clip)
    _finite(norm, "the gradient's norm", step, stage)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.step()
    return parts | {"norm": norm}


def _finite(value: Tensor, what: str, step: int, stage: Stage) -> None:
    if not torch.isfinite(value):
        place = f"step {step} (stage {stage.name})"
        raise ModelError(f"training diverged at {place}: {what} is {float(value.detach())}; lower optimiser.rate")


def measure(encoder: BatchEncoder, data: Data, recipe: Recipe, layout: str, quick: bool) -> dict[str, float]:
    """On held-out data; `quick`: one caption per photo, a fifth of the scenes."""
    embedder = RunEmbedder(encoder, layout, recipe.model.tiles())
    found = photo_recalls(embedder, data.held_out, captions=1 if quick else 5)
    found |= scene_recalls(embedder, recipe.held_out_scenes // (5 if quick else 1))
    if data.sts is not None:
        found["sts_dev"] = sts_spearman(embedder, data.sts)
    return found
