"""CLIP and SigLIP against transformers' own models, tokenizers and PIL image processors, one input at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import towers
from command_line import refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from vectors import cosines

from e5v_search import Collection
from e5v_search.backbones import Embedder
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.two_towers import TwoTowers
from e5v_search.errors import IncompleteCheckpoint, ModelError, NotAPicture, OutOfMemory, UsageError

SAMPLES = sorted((Path(__file__).parent.parent / "e5v_search/samples").glob("*.jpg"))
SIZES = [(56, 56), (57, 113), (333, 500), (500, 333), (1, 1), (5, 600), (600, 5), (3, 56), (55, 57)]
KINDS = ["clip", "siglip"]


PICTURES = [*(noise(*size) for size in SIZES), *(Image.open(path).convert("RGB") for path in SAMPLES[:3])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("towers")
    return {kind: towers.build(base / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, TwoTowers]:
    return {kind: TwoTowers.load(str(folder), device="cpu", dtype="float32") for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(kind: str, loaded: dict[str, TwoTowers]) -> TwoTowers:
    return loaded[kind]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def test_equals_the_library(kind: str, ours: TwoTowers, folders: dict[str, Path]) -> None:
    library = towers.Library(folders[kind], kind)
    # SigLIP reads lower case alone; CLIP's own tokenizer sees to that
    texts = np.stack([library.text(t.lower() if kind == "siglip" else t) for t in towers.TEXTS])
    images = np.stack([library.image(p) for p in PICTURES])
    assert ours.dim == texts.shape[1] == images.shape[1]
    assert cosines(ours.embed_texts(towers.TEXTS), texts).min() > 0.99999
    assert cosines(ours.embed_images(PICTURES), images).min() > 0.99999
    for x in (texts, images):
        assert np.abs(x @ x.T)[~np.eye(len(x), dtype=bool)].min() < 0.9  # inputs do not all look alike
    pairs = [(p, towers.TEXTS[i % 4]) for i, p in enumerate(PICTURES)]
    total = images + texts[np.arange(len(pairs)) % 4]
    np.testing.assert_allclose(ours.embed_composed(pairs, normalise=False), total, atol=1e-4)
    expected = total / np.linalg.norm(total, axis=1, keepdims=True)
    assert cosines(ours.embed_composed(pairs), expected).min() > 0.99999


@given(height=st.integers(1, 400), width=st.integers(1, 400))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pixels_are_those_of_the_library(kind: str, height: int, width: int, ours: TwoTowers, folders: dict[str, Path]) -> None:
    processor = (CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil).from_pretrained(folders[kind])
    image = noise(height, width)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    found = ours.pixels.normalised(torch.from_numpy(ours.prepare(image))[None])
    # what is longer is cut before it is resized, and then its edges are rounded otherwise: 13 of 255 steps seen in noise
    threads = max(height, width) > 128 * min(height, width)
    np.testing.assert_allclose(found, expected, atol=0.25 if threads else 1e-5)


def test_a_thread_of_a_picture_takes_no_gigabytes(loaded: dict[str, TwoTowers], folders: dict[str, Path]) -> None:
    thread = noise(3, 1200)
    expected = CLIPImageProcessorPil.from_pretrained(folders["clip"])(images=thread, return_tensors="pt")["pixel_values"][0]
    pixels = loaded["clip"].pixels
    found = pixels.normalised(torch.from_numpy(pixels(thread))[None])[0]
    assert float((found - expected).abs().max()) < 0.1  # of a range of four: a rounding here and there
    assert pixels(Image.new("RGB", (1, 60_000), "red")).shape == (3, towers.SIDE, towers.SIDE)


def test_a_batch_gives_what_single_items_give(ours: TwoTowers) -> None:
    singles = np.concatenate([ours.embed_texts([t]) for t in towers.TEXTS])
    assert cosines(ours.embed_texts(towers.TEXTS), singles).min() > 0.999999
    singles = np.concatenate([ours.embed_images([p]) for p in PICTURES])
    prepared = [ours.prepare(p) for p in PICTURES]
    for x in (ours.embed_images(PICTURES), ours.embed_prepared(prepared), *ours.embed_views(prepared, ["retrieval", "cirr"])):
        assert cosines(x, singles).min() > 0.999999


def test_shapes_and_lengths(ours: TwoTowers) -> None:
    x = ours.embed_texts(towers.TEXTS)
    assert (x.dtype, x.shape) == (np.float32, (4, ours.dim))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    assert ours.embed_texts([]).shape == ours.embed_images([]).shape == ours.embed_composed([]).shape == (0, ours.dim)
    assert ours.embed_views([], ["retrieval", "cirr"]).shape == (2, 0, ours.dim)


def test_a_long_text_is_cut_at_the_towers_context(ours: TwoTowers) -> None:
    start = "red cars and blue boats " * 20
    np.testing.assert_array_equal(ours.embed_texts([start + "snow"]), ours.embed_texts([start + "a dog"]))


def test_prompt_sets_change_nothing_and_the_fingerprint_says_so(ours: TwoTowers) -> None:
    np.testing.assert_array_equal(ours.embed_texts(["a dog"], "sts"), ours.embed_texts(["a dog"], "retrieval"))
    assert ours.fingerprint == f"local@{ours.made_by.revision[:12]}/none/pil/none/float"
    assert str(ours.made_by.with_prompts("cirr")) == ours.fingerprint


def test_case_and_punctuation(folders: dict[str, Path], loaded: dict[str, TwoTowers], copy: Callable[[str], Path]) -> None:
    plain, written = ["a dog in the snow"], ["A Dog, in the snow!"]
    second = loaded["siglip"]
    assert cosines(second.embed_texts(["A Dog IN the snow"]), second.embed_texts(plain))[0] > 0.999999
    assert cosines(second.embed_texts(written), second.embed_texts(plain))[0] < 0.999
    folder = copy("siglip")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    first = TwoTowers.load(str(folder), device="cpu")
    np.testing.assert_array_equal(first.embed_texts(written), first.embed_texts(plain))


def test_lower_precision_stays_close(ours: TwoTowers, kind: str, folders: dict[str, Path]) -> None:
    half = TwoTowers.load(str(folders[kind]), device="cpu", dtype="bfloat16")
    assert half.fingerprint == ours.fingerprint
    assert cosines(half.embed_images(PICTURES), ours.embed_images(PICTURES)).min() > 0.98


def test_out_of_memory_halves_the_batch_and_goes_on(
    ours: TwoTowers, kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = TwoTowers.load(str(folders[kind]), device="cpu", dtype="float32")
    features = small.model.get_image_features
    most = 2

    def limited(pixel_values: torch.Tensor) -> object:
        if len(pixel_values) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return features(pixel_values=pixel_values)

    monkeypatch.setattr(small.model, "get_image_features", limited)
    assert cosines(small.embed_images(PICTURES), ours.embed_images(PICTURES)).min() > 0.999999
    most = 0
    with pytest.raises(OutOfMemory, match="too little memory for one input"):
        small.embed_images(PICTURES[:1])


def test_unusable_picture_is_an_error_of_its_own(ours: TwoTowers, tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_text("no picture")
    with pytest.raises(NotAPicture, match=r"no\.jpg"):
        ours.embed_images([SAMPLES[0], tmp_path / "no.jpg"])


def test_there_are_no_words_to_explain_with(ours: TwoTowers) -> None:
    x = ours.embed_texts(["a dog", "a cat"])
    with pytest.raises(ModelError, match="no vocabulary"):
        ours.nearest_words(x)
    with pytest.raises(ModelError, match="no vocabulary"):
        ours.shared_words(x[0], x)


# whole programs


def test_index_and_search(ours: TwoTowers, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in SAMPLES:
        shutil.copy(path, photos)
    name = tmp_path / "c"
    result = run("index", photos, "-c", name, "--model", folders[kind], "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["added"] == len(SAMPLES)
    x = ours.embed_images(SAMPLES)
    scores = dict(zip((p.name for p in SAMPLES), x @ ours.embed_texts(["a dog in the snow"])[0], strict=True))
    found = json.loads(run("search", "a dog in the snow", "-c", name, "--json").stdout)
    assert "/none/pil/none/float" in found["fingerprint"]
    assert [Path(hit["path"]).name for hit in found["hits"]] == sorted(scores, key=lambda p: -scores[p])[:10]
    composed = ours.embed_composed([(SAMPLES[0], "make it snow")])[0]
    scores = dict(zip((p.name for p in SAMPLES[1:]), x[1:] @ composed, strict=True))
    with Collection.open(str(name), embedder=ours) as c:
        assert [Path(str(hit.path)).name for hit in c.search(image=SAMPLES[0], modify="make it snow", k=5)] == sorted(
            scores, key=lambda p: -scores[p]
        )[:5]
    assert "no vocabulary" in refused(3, "search", "a dog", "-c", name, "--explain")


def test_eval_folder(ours: TwoTowers, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    lines = ["file,caption"]
    for photo in SAMPLES[:5]:
        shutil.copy(photo, tmp_path)
        lines.append(f"{photo.name},{photo.stem.replace('-', ' ')}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    command = ("eval", "folder", "--data", tmp_path, "--model", folders[kind], "--cache", tmp_path / "cache", "--json", "-q")
    found = json.loads(run(*command).stdout)
    scores = ours.embed_texts([photo.stem.replace("-", " ") for photo in SAMPLES[:5]]) @ ours.embed_images(SAMPLES[:5]).T
    assert found["metrics"]["t2i_r@1"] == pytest.approx(100 * np.mean(scores.argmax(axis=1) == np.arange(5)))
    # another prompt set is the same model: nothing is embedded again
    assert json.loads(run(*command, "--prompts", "prompt").stdout)["embedded"] == 0


# what is refused


def test_a_family_loads_its_own_models_alone(folders: dict[str, Path]) -> None:
    assert isinstance(Embedder.load(str(folders["clip"]), device="cpu"), TwoTowers)
    with pytest.raises(ModelError, match="holds a model for TwoTowers, not for LlavaNextEmbedder"):
        LlavaNextEmbedder.load(str(folders["clip"]), device="cpu")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantize": "4bit"}, r"--quantize 4bit is for llava_next, qwen2_vl, .*, phi3_v: leave --quantize out"),
        ({"quantize": "int8"}, r"--quantize int8 is for llava_next: leave --quantize out"),
        ({"tiles": "base"}, r"--tiles is for llava_next: leave --tiles out"),
        ({"adapter": "somewhere"}, r"--adapter is for llava_next, .*: leave --adapter out"),
    ],
)
def test_options_of_other_families_are_refused(options: dict[str, str], told: str, kind: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=f"is a {kind} model; {told}"):
        Embedder.load(str(folders[kind]), device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["siglip2", "blip", None])
def test_unknown_families_are_refused_with_the_list(model_type: str | None, copy: Callable[[str], Path]) -> None:
    folder = copy("siglip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(ModelError, match=rf"'{model_type or 'nameless'}' model; supported: llava_next .*; clip .*; siglip "):
        Embedder.load(str(folder))


def test_missing_weights_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    weights = load_file(folder / "model.safetensors")
    for lost in ("visual_projection.weight", "text_projection.weight"):
        del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match="lacks 2 tensors, the first is text_projection"):
        Embedder.load(str(folder), device="cpu")
    save_file(
        weights | {"visual_projection.weight": torch.zeros(3, 3)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(IncompleteCheckpoint, match="cannot be loaded"):
        Embedder.load(str(folder), device="cpu")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(IncompleteCheckpoint, match="cannot be loaded"):
        Embedder.load(str(folder), device="cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(IncompleteCheckpoint, match="pickled weights only"):
        Embedder.load(str(folder))


def test_code_of_a_models_author_is_not_run(kind: str, copy: Callable[[str], Path], ours: TwoTowers) -> None:
    folder = copy(kind)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads((folder / "config.json").read_text())
    auto = {name: f"evil.{name}" for name in ("AutoModel", "AutoConfig", "AutoProcessor", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    x = Embedder.load(str(folder), device="cpu", dtype="float32").embed_texts(towers.TEXTS)
    np.testing.assert_array_equal(x, ours.embed_texts(towers.TEXTS))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "evil"}))
    with pytest.raises(ModelError, match=r"holds a 'evil' model; supported: .*code of its author.* is not run"):
        Embedder.load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_missing_files_are_named(name: str, copy: Callable[[str], Path]) -> None:
    folder = copy("siglip")
    (folder / name).unlink()
    with pytest.raises(IncompleteCheckpoint, match=name):
        Embedder.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 64}, "size 64"),
        ({"crop_size": {"height": 40, "width": 40}}, "crop_size {'height': 40"),
        ({"size": {"longest_edge": 56}}, "longest_edge"),
        ({"size": {"shortest_edge": 40}}, "shortest_edge"),
        ({"do_resize": False}, "do_resize false"),
        ({"image_mean": None}, "no image_mean"),
    ],
)
def test_image_settings_that_are_not_understood(change: dict[str, object], message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("siglip" if change == {"size": 64} else "clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="image settings are not supported") as refusal:
        Embedder.load(str(folder), device="cpu")
    assert message in str(refusal.value)


def test_old_settings_say_sizes_as_bare_numbers(copy: Callable[[str], Path], loaded: dict[str, TwoTowers]) -> None:
    folder = copy("clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": towers.SIDE, "crop_size": towers.SIDE}))
    old = TwoTowers.load(str(folder), device="cpu")
    np.testing.assert_array_equal(old.prepare(PICTURES[2]), loaded["clip"].prepare(PICTURES[2]))
