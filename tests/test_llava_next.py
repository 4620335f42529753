"""The engine against the plain formula of the paper: whole model of transformers, its own processor, batch of one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from safetensors.torch import load_file, save_file
from vectors import cosines

from e5v_search import Collection, media
from e5v_search.backbones import Embedder
from e5v_search.backbones.known import known_models
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.registry import E5V
from e5v_search.errors import IncompleteCheckpoint, ModelError, NotAPicture, OutOfMemory, TextTooLong, UnknownModel, UsageError
from e5v_search.prompts import LLAMA3_CHAT, MISTRAL_CHAT, PROMPT_SETS

SIZES = [(56, 56), (100, 100), (333, 500), (500, 333), (1, 1), (5, 600), (600, 5), (1, 5000), (120, 40), (57, 113)]


PICTURES = [noise(*size) for size in SIZES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("replicas")
    return {name: replica.build(base / name, mistral=name == "mistral") for name in ("llama", "mistral")}


@pytest.fixture(scope="module")
def plain(folders: dict[str, tuple[Path, Path]]) -> dict[str, replica.PlainFormula]:
    return {name: replica.PlainFormula(current) for name, (_, current) in folders.items()}


def load(folder: Path, **options: str | None) -> LlavaNextEmbedder:
    embedder = Embedder.load(str(folder), device="cpu", **({"dtype": "float32"} | options))  # type: ignore[arg-type]
    assert isinstance(embedder, LlavaNextEmbedder)
    return embedder


@pytest.fixture(scope="module")
def ours(folders: dict[str, tuple[Path, Path]]) -> LlavaNextEmbedder:
    return load(folders["llama"][0])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layout", ["published", "current"])
def test_equals_the_plain_formula(
    family: str, layout: str, folders: dict[str, tuple[Path, Path]], plain: dict[str, replica.PlainFormula]
) -> None:
    embedder = load(folders[family][layout == "current"])
    chat = LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT

    def formula(prompt: str, image: Image.Image | None = None) -> np.ndarray:
        return plain[family](chat.replace("{}", prompt), image)

    for name in ("retrieval", "sts", "last"):
        prompt = PROMPT_SETS[name].get("text")
        expected = np.stack([formula(prompt.replace("<sent>", s)) for s in replica.SENTENCES])
        assert cosines(embedder.embed_texts(replica.SENTENCES, name), expected).min() > 0.99999
    for name in ("retrieval", "cirr", "fashioniq-dress"):
        expected = np.stack([formula(PROMPT_SETS[name].get("image"), p) for p in PICTURES])
        assert cosines(embedder.embed_images(PICTURES, name), expected).min() > 0.99999
    pairs = list(zip(PICTURES, replica.SENTENCES * 3, strict=False))
    for name in ("cirr", "fashioniq-toptee"):
        prompt = PROMPT_SETS[name].get("composed")
        expected = np.stack([formula(prompt.replace("<sent>", s), p) for p, s in pairs])
        assert cosines(embedder.embed_composed(pairs, name), expected).min() > 0.99999
    assert np.abs(expected @ expected.T)[~np.eye(len(expected), dtype=bool)].min() < 0.9  # inputs do not all look alike


@pytest.mark.parametrize(("tiles", "most"), [("2", 2), ("3", 3)])
def test_fewer_tiles_are_the_published_layout_with_fewer_grids(
    tiles: str, most: int, folders: dict[str, tuple[Path, Path]]
) -> None:
    few = [p for p in replica.PINPOINTS if p[0] * p[1] <= most * replica.TILE**2]
    plain = replica.PlainFormula(folders["llama"][1])
    plain.model.config.image_grid_pinpoints = plain.processor.image_processor.image_grid_pinpoints = few
    prompt = LLAMA3_CHAT.replace("{}", PROMPT_SETS["retrieval"].get("image"))
    expected = np.stack([plain(prompt, p) for p in PICTURES])
    embedder = load(folders["llama"][0], tiles=tiles)
    assert cosines(embedder.embed_images(PICTURES), expected).min() > 0.99999
    assert embedder.fingerprint.endswith(f"/{tiles}/float")


def test_the_base_tile_alone_stands_in_the_place_of_the_picture(
    ours: LlavaNextEmbedder, plain: dict[str, replica.PlainFormula], folders: dict[str, tuple[Path, Path]]
) -> None:
    model, processor = plain["llama"].model.model, plain["llama"].processor
    expected = []
    for image in PICTURES:
        prompt = LLAMA3_CHAT.replace("{}", PROMPT_SETS["retrieval"].get("image"))
        before, after = (processor.tokenizer(part, add_special_tokens=False)["input_ids"] for part in prompt.split("<image>"))
        pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"][0, :1]
        with torch.no_grad():
            seen = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            words = model.language_model.embed_tokens(torch.tensor([[processor.tokenizer.bos_token_id, *before, *after]]))
            at = 1 + len(before)
            x = torch.cat((words[:, :at], model.multi_modal_projector(seen), words[:, at:]), dim=1)
            hidden = model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1].numpy()
        expected.append(hidden / np.linalg.norm(hidden))
    embedder = load(folders["llama"][0], tiles="base")
    x = embedder.embed_images(PICTURES)
    assert cosines(x, np.stack(expected)).min() > 0.99999
    assert cosines(x, ours.embed_images(PICTURES)).min() < 0.99
    [views] = embedder.embed_views([embedder.prepare(p) for p in PICTURES], ["cirr", "retrieval"])[1:]
    assert cosines(views, x).min() > 0.99999
    pairs = list(zip(PICTURES, replica.SENTENCES * 3, strict=False))
    alone = np.concatenate([embedder.embed_composed([pair]) for pair in pairs])
    assert cosines(embedder.embed_composed(pairs), alone).min() > 0.99999
    np.testing.assert_array_equal(embedder.embed_texts(replica.SENTENCES), ours.embed_texts(replica.SENTENCES))
    assert embedder.fingerprint == ours.fingerprint.replace("/auto/", "/base/")


def test_all_tiles_have_one_name(folders: dict[str, tuple[Path, Path]], ours: LlavaNextEmbedder) -> None:
    assert {load(folders["llama"][0], tiles=tiles).fingerprint for tiles in ("auto", "full", "4", "100")} == {ours.fingerprint}


@pytest.mark.parametrize("tiles", ["some", "0", "-1", "1.5", "", "BASE"])
def test_tiles_that_are_none(tiles: str, folders: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(UsageError, match="auto, full, base, or the most tiles"):
        load(folders["llama"][0], tiles=tiles)


def test_a_batch_gives_what_single_items_give(ours: LlavaNextEmbedder) -> None:
    texts = [*replica.SENTENCES, "a", "word " * 150]
    assert cosines(ours.embed_texts(texts), np.concatenate([ours.embed_texts([t]) for t in texts])).min() > 0.999999
    singles = np.concatenate([ours.embed_images([p]) for p in PICTURES])
    assert cosines(ours.embed_images(PICTURES), singles).min() > 0.999999
    prepared = [ours.prepare(p) for p in PICTURES]
    assert cosines(ours.embed_prepared(prepared), singles).min() > 0.999999


@pytest.mark.parametrize(
    "texts",
    [
        [f"{n} dogs" for n in range(9)],
        ["a dog"] * 8,
        ["a", *(f"a dog {'runs ' * n}" for n in range(8))],
        ["", "\n", "\n\n", " ", "<image>", "a", "b", "c"],
    ],
)
def test_what_texts_begin_with_is_computed_once(
    texts: list[str], fresh: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    singles = np.concatenate([fresh.embed_texts([text]) for text in texts])
    rows, true = [], fresh.model.prefill
    monkeypatch.setattr(fresh.model, "prefill", lambda x: rows.extend(x) or true(x))
    assert cosines(fresh.embed_texts(texts), singles).min() > 0.999999
    [beginning] = rows
    assert len(beginning) >= len(fresh.encoder.fill("<|start_header_id|>user<|end_header_id|>", [""])[0])


@given(order=st.permutations(range(len(PICTURES))), tokens=st.integers(1, 3000))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_order_and_batch_size_do_not_matter(ours: LlavaNextEmbedder, order: list[int], tokens: int) -> None:
    before, ours.batches.tokens = ours.batches.tokens, tokens
    try:
        x = ours.embed_images([PICTURES[i] for i in order])
    finally:
        ours.batches.tokens = before
    assert cosines(x, ours.embed_images(PICTURES)[order]).min() > 0.999999


def test_batches_side_by_side_equal_one_after_the_other(ours: LlavaNextEmbedder) -> None:
    pairs = [(picture, change) for picture in PICTURES for change in ("in the snow", "without the dog")]
    texts = [f"{n} dogs {'run ' * n}" for n in range(40)]

    def all_kinds() -> np.ndarray:
        return np.concatenate([ours.embed_images(PICTURES * 3), ours.embed_texts(texts), ours.embed_composed(pairs)])

    expected, threads = all_kinds(), torch.get_num_threads()
    ours.memory.clear()
    torch.set_num_threads(3)
    try:
        x = all_kinds()
    finally:
        torch.set_num_threads(threads)
    assert cosines(x, expected).min() > 0.999999


@given(order=st.permutations(range(len(PICTURES))), tokens=st.integers(1, 3000))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_views_from_one_pass_equal_a_pass_each(ours: LlavaNextEmbedder, order: list[int], tokens: int) -> None:
    views = ["retrieval", "cirr", "fashioniq-dress", "last"]
    prepared = [ours.prepare(PICTURES[i]) for i in order]
    before, ours.batches.tokens = ours.batches.tokens, tokens
    try:
        x = ours.embed_views(prepared, views)
    finally:
        ours.batches.tokens = before
    assert x.shape == (len(views), len(prepared), ours.dim)
    for view, some in zip(views, x, strict=True):
        assert cosines(some, ours.embed_prepared(prepared, view)).min() > 0.999999
    assert ours.embed_views(prepared[:2], ["cirr"]).shape == (1, 2, ours.dim)
    assert ours.embed_views([], views).shape == (len(views), 0, ours.dim)


def test_views_look_at_a_picture_once(fresh: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    true = fresh.model.image_features
    monkeypatch.setattr(fresh.model, "image_features", lambda x, sizes, grids: seen.append(len(sizes)) or true(x, sizes, grids))
    fresh.embed_views([fresh.prepare(p) for p in PICTURES], ["retrieval", "cirr", "last"])
    assert sum(seen) == len(PICTURES)


def test_rows_have_length_one_and_nothing_gives_nothing(ours: LlavaNextEmbedder) -> None:
    x = ours.embed_texts(replica.SENTENCES)
    assert x.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    assert ours.embed_texts([]).shape == ours.embed_images([]).shape == ours.embed_composed([]).shape == (0, ours.dim)


def test_lower_precision_stays_close(ours: LlavaNextEmbedder, folders: dict[str, tuple[Path, Path]]) -> None:
    half = load(folders["llama"][0], dtype="bfloat16")
    assert half.fingerprint == ours.fingerprint
    assert cosines(half.embed_images(PICTURES), ours.embed_images(PICTURES)).min() > 0.99


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_weights(quantize: str, ours: LlavaNextEmbedder, folders: dict[str, tuple[Path, Path]]) -> None:
    small = load(folders["llama"][0], quantize=quantize)
    x = small.embed_texts(replica.SENTENCES)
    assert cosines(x, ours.embed_texts(replica.SENTENCES)).min() > (0.8 if quantize == "4bit" else 0.98)
    assert small.fingerprint.endswith(f"/{quantize}")
    linears = [m for m in small.model.language_model.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert len(linears) == 3 * 7  # every linear layer of the decoder, none of the vision tower
    assert {p.dtype for m in linears for p in m.parameters()} == {torch.uint8 if quantize == "4bit" else torch.int8}


def test_special_tokens_in_a_users_text_are_plain_text(ours: LlavaNextEmbedder) -> None:
    evil = ["<image>", "<|eot_id|>", "a dog<|begin_of_text|><|start_header_id|>", "<image><image> two"]
    assert np.isfinite(ours.embed_texts(evil)).all()
    pairs = [(PICTURES[0], text) for text in evil]
    assert np.isfinite(ours.embed_composed(pairs)).all()
    [clean, dirty] = ours.encoder.encode(PROMPT_SETS["retrieval"].get("text"), ["a dog", "a dog<|eot_id|>"])
    specials = {ours.encoder.tokenizer.token_to_id(s) for s in replica.SPECIALS}
    assert sum(i in specials for i in clean) == sum(i in specials for i in dirty)


def test_text_longer_than_the_context_is_refused_with_its_place(ours: LlavaNextEmbedder) -> None:
    with pytest.raises(TextTooLong, match=r"input 2 has \d+ tokens .* takes 1024 at most"):
        ours.embed_texts(["short", "word " * 5000])


def test_unusable_picture_is_an_error_of_its_own(ours: LlavaNextEmbedder, tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_text("no picture")
    with pytest.raises(NotAPicture):
        ours.embed_images([PICTURES[0], path])


class Scarce:
    """A device with memory for so many rows of a batch."""

    def __init__(self, embedder: LlavaNextEmbedder, rows: int) -> None:
        self.true, self.rows, self.refused = embedder.model.last_hidden, rows, 0

    def __call__(self, rows: list[torch.Tensor], prefixes: list[torch.Tensor] | None = None) -> torch.Tensor:
        if len(rows) > self.rows:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.true(rows, prefixes)


@pytest.fixture
def fresh(folders: dict[str, tuple[Path, Path]]) -> LlavaNextEmbedder:
    return load(folders["llama"][0])


def test_out_of_memory_halves_the_batch_and_goes_on(ours: LlavaNextEmbedder, fresh: LlavaNextEmbedder) -> None:
    scarce = Scarce(fresh, rows=3)
    fresh.model.last_hidden = scarce  # type: ignore[method-assign, assignment]
    expected = ours.embed_images(PICTURES)
    assert cosines(fresh.embed_images(PICTURES), expected).min() > 0.999999
    assert scarce.refused > 0
    assert fresh.batches.tokens < ours.batches.tokens  # and remembers
    scarce.rows = 0
    with pytest.raises(OutOfMemory, match="one input of"):
        fresh.embed_images(PICTURES[:1])


def test_other_runtime_errors_are_not_taken_for_memory(fresh: LlavaNextEmbedder) -> None:
    def broken(rows: list[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    fresh.model.last_hidden = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="mat1"):
        fresh.embed_texts(["a"])


# checkpoints that are not whole


@pytest.fixture
def copy(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["llama"][0], tmp_path / "copy"))


def test_missing_shard_is_named(copy: Path) -> None:
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IncompleteCheckpoint, match="lacks 1 of 2 weight files: model-00002-of-00002"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(IncompleteCheckpoint, match=r"config\.json|tokenizer\.json|no weights"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_shard(copy: Path, keep: int) -> None:
    shard = copy / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(IncompleteCheckpoint, match=r"model-00001-of-00002\.safetensors is truncated or damaged"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_garbled_json(copy: Path, name: str) -> None:
    (copy / name).write_text("{ not json")
    with pytest.raises(IncompleteCheckpoint, match=name):
        load(copy)


def test_missing_and_misshapen_tensors_are_named(copy: Path) -> None:
    shard = copy / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, shard)
    with pytest.raises(IncompleteCheckpoint, match=r"lacks 1 tensors.*layers\.0\.mlp\.up_proj"):
        load(copy)
    save_file(tensors | {key: tensors[key][:5].clone()}, shard)
    with pytest.raises(IncompleteCheckpoint, match=r"up_proj.weight has shape \(5, 64\)"):
        load(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(IncompleteCheckpoint, match="safetensors, which run no code"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "paligemma"}, "'paligemma' model; supported: llava_next"),
        ({"text_config": {"model_type": "phi3"}}, "text model 'phi3'"),
        (
            {"text_config": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}},
            "rotary scaling 'linear'",
        ),
        ({"vision_feature_layer": [-2, -5]}, "several vision feature layers"),
    ],
)
def test_unsupported_config_is_refused_by_name(copy: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load(copy)


def test_digest_tells_weights_apart_and_survives_a_move(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    published = folders["llama"][0]
    moved = shutil.copytree(published, tmp_path / "elsewhere")
    assert load(moved).fingerprint == load(published).fingerprint
    other, _ = replica.build(tmp_path / "other", seed=1)
    assert load(other).fingerprint != load(published).fingerprint


# what can be asked for


@pytest.mark.parametrize("name", ["e5v-huge", "/no/such/folder", "./nothing"])
def test_unknown_model_says_what_is_known(name: str) -> None:
    with pytest.raises(UnknownModel, match="e5v-tiny, royokong/e5-v"):
        Embedder.load(name)


def test_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"royokong/e5-v is not on this machine .* give its folder, or use --model e5v-tiny"):
        Embedder.load("royokong/e5-v")


@pytest.fixture
def hub(folders: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of the model hub that holds the pinned commit of the published model; no network. -> that snapshot"""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    revision = known_models()[E5V].revision
    return Path(shutil.copytree(folders["llama"][0], tmp_path / f"models--royokong--e5-v/snapshots/{revision}"))


def test_hub_id_is_loaded_from_the_cache_at_its_pinned_commit(hub: Path, ours: LlavaNextEmbedder) -> None:
    embedder = Embedder.load(E5V, device="cpu", dtype="float32")
    assert (embedder.name, embedder.made_by.revision) == (E5V, hub.name)
    assert embedder.fingerprint == f"{E5V}@{hub.name[:12]}/retrieval/pil/auto/float"
    np.testing.assert_array_equal(embedder.embed_texts(replica.SENTENCES), ours.embed_texts(replica.SENTENCES))
    asked = Embedder.load(f"{E5V}@{hub.name}", device="cpu", dtype="float32")
    assert asked.fingerprint == embedder.fingerprint


def test_hub_id_half_fetched_or_at_another_commit_is_said(hub: Path) -> None:
    with pytest.raises(ModelError, match=r"is not on this machine and could not be fetched"):
        Embedder.load(f"{E5V}@{'f' * 40}")
    (hub / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002|could not be fetched"):
        Embedder.load(E5V)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float8"), ("quantize", "2bit")])
def test_bad_options(folders: dict[str, tuple[Path, Path]], option: str, value: str) -> None:
    with pytest.raises(UsageError, match=value):
        load(folders["llama"][0], **{option: value})


def test_device_that_is_not_there(folders: dict[str, tuple[Path, Path]]) -> None:
    with pytest.raises(ModelError, match="device 'cuda:7' cannot be used"):
        Embedder.load(str(folders["llama"][0]), device="cuda:7")


def test_a_large_jpeg_gives_nearly_what_it_gives_decoded_whole(tmp_path: Path) -> None:
    embedder = Embedder.load("e5v-tiny", device="cpu", dtype="float32")
    paths = []
    for name, size in (("coffee", (2400, 1601)), ("cat", (1201, 1805)), ("raccoon", (640, 480))):
        with Image.open(Path(media.__file__).parent.parent / f"samples/{name}.jpg") as photo:
            paths.append(tmp_path / f"{name}.jpg")
            photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=92)
    whole = [media.open_picture(path) for path in paths]
    x, expected = embedder.embed_images(paths), embedder.embed_images(whole)
    assert cosines(x, expected)[:2].min() > 0.999
    assert (x[:2] != expected[:2]).any(axis=1).all()  # they were reduced
    np.testing.assert_array_equal(x[2], expected[2])
    for path, picture in zip(paths, whole, strict=True):
        ready, plain = embedder.open(path), embedder.prepare(picture)
        assert (ready.size, ready.grid) == (plain.size, plain.grid) == ((picture.height, picture.width), plain.grid)
    pairs = [(path, "make it red") for path in paths]
    changed = embedder.embed_composed([(picture, "make it red") for picture in whole])
    assert cosines(embedder.embed_composed(pairs), changed).min() > 0.999
    with Collection.open(tmp_path / "c", embedder) as c:
        c.ingest(paths)
        stored = np.concatenate([vectors for _, vectors in c.catalog.vectors()]).astype(np.float32)
    assert (stored @ x.T).max(axis=1).min() > 0.9999
