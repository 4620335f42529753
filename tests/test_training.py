import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.config import load_recipe, parse
from e5v_search.errors import DiskFull, IncompleteCheckpoint, ModelError, UsageError
from e5v_search.training import loop, state
from e5v_search.training import maps as maps_of_photos
from e5v_search.training.batches import Batches, caption_words
from e5v_search.training.data import Photos
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.initialise import initialise, initialise_taught_words
from e5v_search.training.loop import Data, begin, train
from e5v_search.training.maps import reduced
from e5v_search.training.measure import recalls, sts_spearman
from e5v_search.training.objective import Objective
from e5v_search.training.recipe import Recipe
from e5v_search.training.taught import Taught, taught
from e5v_search.training.tokenizer import IMAGE, train_tokenizer

RECIPES = sorted((Path(__file__).parent.parent / "training").glob("*.toml"))
WORDS = ("red", "green", "blue", "small", "large", "round", "flat", "wet")


def tiny_recipe(**changes: object) -> Recipe:
    """Two stages, both layouts, every part of the loss that needs no teacher; a model of some thousand weights."""
    weights = {"photos": 1.0, "words": 0.3, "scenes": 0.5, "changes": 0.5, "nli": 0.2, "pages": 0.2}
    weights |= {"language": 0.1, "captioning": 0.1, "told": 0.1}
    stage = {"steps": 2, "photos": 4, "scenes": 2, "triplets": 2, "pages": 2, "bare": 3, "told": 5, "weights": weights}
    data: dict[str, object] = {
        "name": "tiny",
        "save_every": 2,
        "evaluate_every": 100,
        "held_out_scenes": 10,
        "model": {
            "vision": {"width": 16, "layers": 1, "heads": 2, "mlp": 16, "tile": 32},
            "decoder": {"width": 16, "layers": 2, "heads": 2, "mlp": 16, "vocabulary": 600},
            "pinpoints": [[32, 64], [64, 32]],
        },
        "optimiser": {"kind": "muon", "rate": 1e-3, "warmup": 2},
        "stages": [
            stage | {"name": "base", "drop": 0.5, "plain": 0.5, "colour": 0.3, "aside_every": 2},
            stage | {"name": "full", "layout": "full"},
        ],
    }
    return parse(Recipe, data | changes, "tiny")


@pytest.fixture(scope="module")
def data() -> Data:
    rng = np.random.default_rng(0)
    captions = [[f"a {WORDS[i % 8]} thing number {i}", f"{WORDS[(i + 1) % 8]}, near the left"] for i in range(10)]
    photos = Photos([f"{i}.jpg" for i in range(10)], captions, rng.integers(0, 255, (10, 3, 48, 48), dtype=np.uint8))
    triplets = [(f"a {w} thing", f"something {w}", f"nothing {w}") for w in WORDS]
    return Data(photos, photos.first(5), triplets)


@pytest.fixture(scope="module")
def encoder(data: Data) -> BatchEncoder:
    tokenizer = train_tokenizer([c for cs in data.photos.captions for c in cs] * 5, 600)
    model = LlavaNext(tiny_recipe().model.config(tokenizer.encode(IMAGE, add_special_tokens=False).ids[0]))
    initialise(model, torch.Generator().manual_seed(0))
    return BatchEncoder(model, PromptEncoder(tokenizer, model.config.text_config.wording, 1000), max_text=8)


def logged(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if "step" in line and "measured" not in line]


@pytest.fixture(scope="module")
def lessons(data: Data, encoder: BatchEncoder) -> Taught:
    """A teacher that gives random answers."""
    captions = [caption for own in data.photos.captions for caption in own]
    sentences = captions + sorted({s for triplet in data.triplets for s in triplet})
    generator = torch.Generator().manual_seed(5)
    vectors, words = torch.randn(len(sentences), 24, generator=generator), torch.randn(600, 24, generator=generator)
    return taught(sentences, vectors, torch.arange(20) // 2, words, 16)


def quiet(_: str) -> None:
    pass


def test_every_recipe_parses() -> None:
    assert RECIPES
    for path in (path for path in RECIPES if "[[stages]]" in path.read_text()):
        recipe = load_recipe(Recipe, path)
        assert recipe.name == path.stem
        assert recipe.rate_at(recipe.steps - 1) > 0


def test_all_problems_of_a_recipe_are_named_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        tiny_recipe(
            stages=[{"name": "x", "steps": 0, "drop": 1.0, "crop": 0, "layout": "half"}],
            model={"vision": {"width": 30, "heads": 4, "tile": 50}, "pinpoints": []},
            temperature=0.0,
        )
    for part in ("stages[0].layout", "vision.width", "vision.tile", "pinpoints"):
        assert part in str(raised.value)
    with pytest.raises(UsageError, match=r"stages\[0\].steps: must be positive.*drop: must lie.*crop: must lie"):
        tiny_recipe(stages=[{"name": "x", "steps": 0, "drop": 1.0, "crop": 0}])
    with pytest.raises(UsageError, match="photos: two at least"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "photos": 1, "weights": {"captioning": 1.0}}])
    with pytest.raises(UsageError, match="only on the base tile"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "layout": "full", "drop": 0.5}])


def test_the_rate_warms_up_and_follows_its_stages() -> None:
    stages = [{"name": "a", "steps": 4}, {"name": "b", "steps": 3, "rate": [1.0, 0.0]}]
    recipe = tiny_recipe(stages=stages, optimiser={"rate": 1.0, "warmup": 2})
    assert [recipe.rate_at(i) for i in range(7)] == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    assert [recipe.stage_at(i).name for i in range(7)] == list("aaaabbb")


def test_a_run_trains_resumes_and_gives_a_checkpoint(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    recipe = tiny_recipe()
    folder = train(recipe, data, whole, quiet)

    def stop(*arguments: object) -> dict[str, torch.Tensor]:
        if arguments[4] == 3:  # the step
            raise KeyboardInterrupt
        return one_step(*arguments)  # type: ignore[arg-type]

    # stopped one step after the last save, which is then done again
    one_step = loop._step
    monkeypatch.setattr(loop, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, parted, quiet)
    monkeypatch.undo()
    assert [line["step"] for line in logged(parted)] == [0, 1, 2]
    with (parted / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "sta')
    train(recipe, data, parted, quiet)
    assert logged(parted) == logged(whole)
    assert len(logged(whole)) == recipe.steps
    assert (parted / "model" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    embedder = LlavaNextEmbedder.load(str(folder), device="cpu")
    photos = embedder.embed_images([Image.fromarray(p.transpose(1, 2, 0)) for p in data.photos.pixels[:3]])
    assert photos.shape == (3, 16)
    assert np.allclose(np.linalg.norm(photos, axis=1), 1, atol=1e-5)


def test_a_run_goes_on_with_its_own_recipe_only(tmp_path: Path, data: Data) -> None:
    recipe = tiny_recipe(stages=[{"name": "a", "steps": 1, "photos": 2}])
    train(recipe, data, tmp_path, quiet)
    with pytest.raises(IncompleteCheckpoint, match="another recipe"):
        train(replace(recipe, seed=1), data, tmp_path, quiet)
    (tmp_path / "state.safetensors").write_bytes((tmp_path / "state.safetensors").read_bytes()[:1000])
    with pytest.raises(IncompleteCheckpoint, match=r"state\.safetensors cannot be read"):
        train(recipe, data, tmp_path, quiet)


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, encoder: BatchEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(module.parameters())
    path, learned = tmp_path / "state.safetensors", dict(module.named_parameters())
    state.save_state(path, learned, optimiser, 3, "id")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(DiskFull, match="no space"):
        state.save_state(path, learned, optimiser, 4, "id")
    assert state.load_state(path, learned, optimiser, "id") == 3


def test_divergence_stops_and_names_the_step(tmp_path: Path, data: Data) -> None:
    recipe = tiny_recipe(optimiser={"rate": 1e30, "warmup": 1})
    with pytest.raises(ModelError, match=r"diverged at step [123] \(stage \w+\): .* is (nan|inf)"):
        train(recipe, data, tmp_path, quiet)


def test_a_batch_depends_on_its_step_alone(data: Data, encoder: BatchEncoder) -> None:
    def make() -> Batches:
        return Batches(tiny_recipe(), data.photos, data.triplets, encoder.tokenizer)

    forwards, backwards = make(), make()
    first = [forwards.make(step) for step in range(4)]
    second = [backwards.make(step) for step in (3, 2, 1, 0)][::-1]
    for a, b in zip(first, second, strict=True):
        assert (a.captions, a.changes, a.triplets) == (b.captions, b.changes, b.triplets)
        assert torch.equal(a.words, b.words)
        assert a.told is not None
        assert b.told is not None
        assert torch.equal(a.told.pixels, b.told.pixels)
        assert torch.equal(a.told.shares, b.told.shares)
    assert isinstance(first[0].photos, torch.Tensor)
    assert first[0].photos.shape == (4, 3, 32, 32)
    assert [bool(batch.changes) for batch in first] == [True, False, True, True]  # aside_every = 2, then 1
    seen = [c for batch in first[:3] for c in batch.captions]
    assert len({next(i for i, cs in enumerate(data.photos.captions) if c in cs) for c in seen[:10]}) == 10


def test_rare_words_weigh_more(encoder: BatchEncoder) -> None:
    words = caption_words([["a dog", "a dog"], ["a cat"]], encoder.tokenizer)
    weight = {encoder.tokenizer.decode([int(i)]): float(w) for i, w in zip(*words[0], strict=True)}
    assert sum(weight.values()) == pytest.approx(1)
    assert weight["a"] == min(weight.values())


def test_a_batch_gives_what_single_rows_give(encoder: BatchEncoder) -> None:
    with torch.no_grad():
        whole = encoder.texts(["a red thing", "a thing that is rather large and green"])
        single = torch.cat([encoder.texts([s]) for s in ["a red thing", "a thing that is rather large and green"]])
        assert torch.allclose(whole, single, atol=1e-5)


def test_the_states_of_all_positions_are_those_of_single_rows(encoder: BatchEncoder) -> None:
    rows = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (3, 7)]
    with torch.no_grad():
        states = encoder.model.language_model.states(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        for row, found in zip(rows, states, strict=True):
            single = encoder.model.last_hidden([row[: n + 1] for n in range(len(row))])
            assert torch.allclose(found[: len(row)], single, atol=1e-5)


def test_bare_sentences_begin_and_end(encoder: BatchEncoder) -> None:
    sentences = ["a large round thing", "wet", "a green thing number 3"]
    ids = [[*encoder.tokenizer.encode(s).ids, encoder.prompts.id("<|end_of_text|>")] for s in sentences]
    with torch.no_grad():
        hidden, tokens = encoder.bare_tokens(sentences)
        singles = [encoder.bare_tokens([s]) for s in sentences]
    assert sorted(tokens.tolist()) == sorted(i for row in ids for i in row[1:])
    for (states, own), row in zip(singles, ids, strict=True):
        assert own.tolist() == row[1:]
        at = next(i for i in range(len(tokens)) if tokens[i : i + len(own)].tolist() == own.tolist())
        assert torch.allclose(hidden[at : at + len(own)], states, atol=1e-5)


def test_answers_follow_their_prompts(encoder: BatchEncoder) -> None:
    """The state that foretells an answer's first token is the embedding by the same prompt."""
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder.base_features(pixels)
        of_picture, said = encoder.caption_tokens(features, ["a wet thing"])
        of_sentence, again = encoder.paraphrase_tokens(["something wet"], ["a wet thing"])
        assert torch.allclose(of_picture[0], encoder.pictures(features, "prompt")[0], atol=1e-5)
        assert torch.allclose(of_sentence[0], encoder.texts(["something wet"], "prompt")[0], atol=1e-5)
    assert torch.equal(said, again)
    assert encoder.tokenizer.decode(said.tolist(), skip_special_tokens=False) == " a wet thing<|eot_id|>"


def test_a_stage_that_tells_no_pairs_apart_has_no_contrastive_part(data: Data, encoder: BatchEncoder) -> None:
    weights = {"photos": 0.0, "answers": 1.0, "captioning": 1.0, "language": 1.0}
    recipe = tiny_recipe(stages=[{"name": "x", "steps": 1, "photos": 6, "bare": 2, "aside_every": 9, "weights": weights}])
    batches = Batches(recipe, data.photos, data.triplets, encoder.tokenizer)
    batch, stage = batches.make(0), recipe.stages[0]
    for one, other in zip(batch.captions, batch.others, strict=True):
        assert one != other
        assert any({one, other} <= set(captions) for captions in data.photos.captions)
    objective = Objective(recipe, encoder, batches.log_prior)
    parts = objective(batch, stage, torch.Generator().manual_seed(0))
    assert set(parts) == {"answers", "captioning", "language"}
    for part in parts.values():
        assert float(part.detach()) == pytest.approx(np.log(600), rel=0.1)  # random weights know nothing
    objective.total(parts, stage).backward()
    assert objective.log_scale.grad is None
    for part in (encoder.model.vision_tower, encoder.model.language_model):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    encoder.model.zero_grad()


def test_dropped_patches_never_enter(encoder: BatchEncoder) -> None:
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert encoder.base_features(pixels).shape == (3, 4, 16)
        kept = encoder.base_features(pixels, 0.5, torch.Generator().manual_seed(0))
        assert kept.shape == (3, 2, 16)
        assert not torch.allclose(kept, encoder.base_features(pixels, 0.5, torch.Generator().manual_seed(1)))


def test_plain_patches_are_left_out_first(encoder: BatchEncoder) -> None:
    pixels = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    pixels[:, :, 16:, :16] = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        [kept] = encoder.base_features(pixels, 0.75, torch.Generator().manual_seed(0), plain=True)
        whole = encoder.base_features(pixels)
        tower = encoder.model.vision_tower
        x = tower.embeddings(encoder.normalised(pixels))[:, [0, 3]]  # class, and the patch in the lower left corner
        x = tower.pre_layrnorm(x)
        for layer in tower.encoder.layers:
            x = layer(x)
        assert torch.allclose(kept, encoder.model.multi_modal_projector(x[:, 1:])[0], atol=1e-5)
    assert whole.shape == (1, 4, 16)


def test_colours_stray_and_pictures_stay_apart(encoder: BatchEncoder) -> None:
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        same, other = (encoder.base_features(pixels, 0.0, torch.Generator().manual_seed(0), colour=c) for c in (0.0, 0.4))
        again = encoder.base_features(pixels, 0.0, torch.Generator().manual_seed(0), colour=0.4)
    assert torch.equal(other, again)
    assert not torch.allclose(same, other, atol=1e-3)


def test_targets_compare_as_the_teacher_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, words = torch.randn(30, 12, generator=generator), torch.randn(9, 12, generator=generator)
    lessons = taught([str(i) for i in range(30)], vectors, torch.arange(20) // 4, words, 12)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert torch.allclose(lessons.targets @ lessons.targets.T, unit @ unit.T, atol=1e-5)
    mean = torch.nn.functional.normalize(lessons.targets[4:8].mean(dim=0), dim=0)
    assert torch.allclose(lessons.photos[1], mean, atol=1e-5)
    assert lessons.captions.shape == (20, 12)
    # wider than the teacher: the rest is nothing; narrower: what matters most stays
    assert torch.equal(taught([""] * 30, vectors, torch.arange(20) // 4, words, 15).targets[:, 12:], torch.zeros(30, 3))
    strong = vectors * torch.tensor([10.0] * 4 + [0.1] * 8)
    unit = torch.nn.functional.normalize(strong, dim=1)
    four = taught([""] * 30, strong, torch.arange(20) // 4, words * torch.tensor([10.0] * 4 + [0.1] * 8), 4).targets
    assert torch.allclose(four @ four.T, unit @ unit.T, atol=1e-2)


def test_the_teachers_parts_fall_when_trained_and_reach_their_own_weights(
    data: Data, encoder: BatchEncoder, lessons: Taught
) -> None:
    reach = {"taught": {"language_model"}, "pooled": {"vision_tower", "multi_modal_projector"}}
    reach["seen"] = reach["taught"] | reach["pooled"]
    for part, modules in reach.items():
        stages = [{"name": part, "steps": 30, "photos": 5, "sentences": 6, "weights": {"photos": 0.0, part: 1.0}}]
        recipe = tiny_recipe(stages=stages, teacher="random")
        initialise(encoder.model, torch.Generator().manual_seed(0))
        batches = Batches(recipe, data.photos, data.triplets, encoder.tokenizer, len(lessons.sentences))
        objective = Objective(recipe, encoder, batches.log_prior, lessons)
        stage, generator = recipe.stages[0], torch.Generator().manual_seed(0)
        optimiser = torch.optim.Adam([*encoder.model.parameters(), *objective.parameters()], lr=5e-3)
        values = []
        for step in range(30):
            parts = objective(batches.make(step), stage, generator)
            assert set(parts) == {part}
            optimiser.zero_grad()
            objective.total(parts, stage).backward()
            optimiser.step()
            values.append(float(parts[part].detach()))
        assert sum(values[-5:]) < 0.9 * sum(values[:5])
        touched = {name.partition(".")[0] for name, p in encoder.model.named_parameters() if p.grad is not None}
        assert touched - {"image_newline"} == modules


def test_patches_learn_what_the_picture_teacher_sees_there(data: Data, encoder: BatchEncoder) -> None:
    """A teacher of colours, of photos that are 4 x 4 patches of one colour each."""
    blocks = np.random.default_rng(0).integers(0, 255, (10, 3, 4, 4), dtype=np.uint8)
    photos = Photos(data.photos.names, data.photos.captions, blocks.repeat(12, axis=2).repeat(12, axis=3))
    weights = {"photos": 0.0, "mapped": 1.0}
    stages = [{"name": "look", "steps": 40, "photos": 8, "drop": 0.5, "crop": 0.5, "colour": 0.1, "weights": weights}]
    recipe = tiny_recipe(stages=stages, picture_teacher="of colours")
    initialise(encoder.model, torch.Generator().manual_seed(0))
    encoder.model.zero_grad()
    batches = Batches(recipe, photos, data.triplets, encoder.tokenizer)
    objective = Objective(recipe, encoder, batches.log_prior, maps=reduced(torch.from_numpy(blocks).half()))
    stage, generator = recipe.stages[0], torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam([*encoder.model.vision_tower.parameters(), *objective.head.parameters()], lr=5e-3)
    values = []
    for step in range(40):
        parts = objective(batches.make(step), stage, generator)
        optimiser.zero_grad()
        objective.total(parts, stage).backward()
        optimiser.step()
        values.append(float(parts["mapped"].detach()))
    assert set(parts) == {"mapped"}
    assert sum(values[-5:]) < 0.5 * sum(values[:5])
    assert {n.partition(".")[0] for n, p in encoder.model.named_parameters() if p.grad is not None} == {"vision_tower"}
    # a stage begins with the best head for the patches as they are
    objective.head.reset_parameters()
    begin(stage, objective, batches)
    with torch.no_grad():
        assert float(objective(batches.make(0), stage, generator)["mapped"]) < 0.6 * values[0]


def test_boxes_tell_what_is_seen_of_a_photo(data: Data, encoder: BatchEncoder) -> None:
    """A photo whose colours are its own coordinates: a crop's corners name its box."""
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(ramp, (96, 96)), np.broadcast_to(ramp[:, None], (96, 96)), np.zeros((96, 96), np.uint8)])
    photos = Photos(data.photos.names, data.photos.captions, np.stack([pixels] * 10))
    recipe = tiny_recipe(stages=[{"name": "x", "steps": 3, "photos": 10, "crop": 0.3}])
    batches = Batches(recipe, photos, data.triplets, encoder.tokenizer)
    mirrored = 0
    for step in range(3):
        batch = batches.make(step)
        assert isinstance(batch.photos, torch.Tensor)
        for picture, (left, top, right, bottom) in zip(batch.photos.float() / 255, batch.boxes.tolist(), strict=True):
            mirrored += left > right
            across, down = (right - left) / 64, (bottom - top) / 64  # to the middle of the outermost pixel
            seen = picture[0, 0, 0], picture[1, 0, 0], picture[0, -1, -1], picture[1, -1, -1]
            assert [float(x) for x in seen] == pytest.approx(
                [left + across, top + down, right - across, bottom - down], abs=0.03
            )
    assert 0 < mirrored < 30


def test_a_run_goes_on_with_a_teacher_that_came_later(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.random.default_rng(0).normal(size=(10, 7, 4, 4)).astype(np.float16)
    monkeypatch.setattr(maps_of_photos, "teacher_maps", lambda *_: raw)
    first = {"name": "base", "steps": 2, "photos": 4, "aside_every": 9}
    train(tiny_recipe(stages=[first]), data, tmp_path, quiet)
    look = {"name": "look", "steps": 2, "photos": 4, "weights": {"photos": 0.0, "mapped": 1.0}}
    train(tiny_recipe(stages=[first, look], picture_teacher="random"), data, tmp_path, quiet)
    lines = logged(tmp_path)
    assert [line["stage"] for line in lines] == ["base", "base", "look", "look"]
    assert "mapped" in lines[-1]
    # and back: weights that no stage needs any more are no reason to guess
    with pytest.raises(IncompleteCheckpoint, match="other weights"):
        train(tiny_recipe(stages=[first, first | {"name": "more"}]), data, tmp_path, quiet)


def test_only_some_photos_may_go_through_the_decoder(
    data: Data, encoder: BatchEncoder, lessons: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"photos": 0.0, "pooled": 1.0, "seen": 1.0}
    recipe = tiny_recipe(stages=[{"name": "x", "steps": 1, "photos": 7, "decoded": 3, "weights": weights}], teacher="random")
    batches = Batches(recipe, data.photos, data.triplets, encoder.tokenizer, len(lessons.sentences))
    objective = Objective(recipe, encoder, batches.log_prior, lessons)
    seen: list[int] = []
    pictures = encoder.pictures

    def counted(features: torch.Tensor) -> torch.Tensor:
        seen.append(len(features))
        return pictures(features)

    monkeypatch.setattr(encoder, "pictures", counted)
    parts = objective(batches.make(0), recipe.stages[0], torch.Generator().manual_seed(0))
    assert set(parts) == {"pooled", "seen"}
    assert seen == [3]


def test_a_stage_may_begin_with_the_teachers_words(data: Data, encoder: BatchEncoder, lessons: Taught) -> None:
    table = encoder.model.language_model.embed_tokens.weight
    before, keep = table.detach().clone(), encoder.prompt_tokens()
    assert encoder.tokenizer.token_to_id(IMAGE) in keep
    initialise_taught_words(encoder.model, lessons.words, keep)
    n = encoder.tokenizer.get_vocab_size()
    others = [i for i in range(min(n, len(table))) if i not in keep]
    assert torch.equal(table[keep], before[keep])
    cosines = torch.nn.functional.cosine_similarity(table[others], lessons.words[others])
    assert torch.allclose(cosines, torch.ones(len(others)), atol=1e-5)


def test_a_recipe_that_asks_a_teacher_names_one() -> None:
    with pytest.raises(UsageError, match="teacher: none is named"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "weights": {"seen": 1.0}}])
    with pytest.raises(UsageError, match="teacher: none is named"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "taught_words": True}])
    with pytest.raises(UsageError, match="picture_teacher: none is named"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "weights": {"mapped": 1.0}}])
    with pytest.raises(UsageError, match=r"weights\.mapped: only on the base tile"):
        tiny_recipe(stages=[{"name": "x", "steps": 1, "layout": "full", "weights": {"mapped": 1.0}}], picture_teacher="x")


def test_long_sentences_are_cut_before_the_prompt(encoder: BatchEncoder) -> None:
    short, long = "wet " * 8, "wet " * 50
    with torch.no_grad():
        assert torch.allclose(encoder.texts([short.strip()]), encoder.texts([long.strip()]), atol=1e-5)


def test_recalls_count_any_right_answer() -> None:
    scores = np.array([[1.0, 0.5, 0, 0], [0.2, 0.9, 0.1, 0], [0.9, 0.5, 0.4, 0.3]])
    assert recalls(scores, [{1}, {1}, {0, 3}], (1, 2)) == {1: pytest.approx(2 / 3), 2: 1.0}


def test_spearman_is_of_ranks_with_ties_at_their_mean(tmp_path: Path) -> None:
    class Angles:
        """Two words meet at an angle that is their number of common letters."""

        def embed_texts(self, texts: list[str], prompts: str) -> np.ndarray:
            assert prompts == "sts"
            angle = np.array([len(text) / 20 for text in texts])
            return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    path = tmp_path / "sts.csv"
    rows = [("5.0", "abc", "abd"), ("1.0", "a", "abcdefgh"), ("3.0", "abc", "a"), ("3.0", "abc", "abcd"), ("x",)]
    path.write_text("".join("\t".join(("g", "f", "y", "1", *row)) + "\n" for row in rows))
    gold, near = [4.0, 1.0, 2.5, 2.5], [4.0, 1.0, 2.0, 3.0]
    assert sts_spearman(Angles(), path) == pytest.approx(np.corrcoef(gold, near)[0, 1])  # type: ignore[arg-type]
