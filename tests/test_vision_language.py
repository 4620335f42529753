"""Qwen2-VL, Qwen3-VL and LLaVA-OneVision against transformers' whole models and PIL processors, Phi-3-vision against its
description step by step; one input at a time."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_models
from command_line import refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from vectors import cosines
from vision_models import KINDS, SENTENCES, Library, independent

from e5v_search.backbones import Embedder
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.llava_onevision import LlavaOnevision
from e5v_search.backbones.phi3_v import Phi3V
from e5v_search.backbones.qwen_vl import Bounds, Qwen2VL, Qwen3VL
from e5v_search.backbones.vision_language import VisionLanguage
from e5v_search.errors import IncompleteCheckpoint, ModelError, NotAPicture, OutOfMemory, TextTooLong, UsageError
from e5v_search.prompts import WORDINGS

SAMPLES = sorted((Path(__file__).parent.parent / "e5v_search/samples").glob("*.*g"))
SIZES = [(28, 28), (57, 113), (333, 500), (500, 333), (1, 1), (5, 300), (300, 5), (90, 91)]
CLASSES = {"qwen2_vl": Qwen2VL, "qwen3_vl": Qwen3VL, "llava_onevision": LlavaOnevision, "phi3_v": Phi3V}


PICTURES = [*(noise(*size) for size in SIZES), Image.open(SAMPLES[0]).convert("RGB")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {kind: vision_models.build(base / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, VisionLanguage]:
    return {kind: VisionLanguage.load(str(folder), device="cpu", dtype="float32") for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ours(kind: str, loaded: dict[str, VisionLanguage]) -> VisionLanguage:
    return loaded[kind]


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def test_equals_the_library(kind: str, ours: VisionLanguage, folders: dict[str, Path]) -> None:
    library, wording = independent(folders[kind], kind), WORDINGS[CLASSES[kind].WORDING]
    assert type(ours) is CLASSES[kind]
    told = [wording.template("text", "retrieval").replace("<sent>", text) for text in SENTENCES]
    texts = np.stack([library(prompt) for prompt in told])
    assert cosines(ours.embed_texts(SENTENCES), texts).min() > 0.9999
    images = np.stack([library(wording.template("image", "retrieval"), p) for p in PICTURES])
    assert cosines(ours.embed_images(PICTURES), images).min() > 0.9999
    changes = [SENTENCES[i % 3] for i in range(len(PICTURES))]
    changed = wording.template("composed", "cirr")
    expected = np.stack([library(changed.replace("<sent>", s), p) for p, s in zip(PICTURES, changes, strict=True)])
    composed = ours.embed_composed(list(zip(PICTURES, changes, strict=True)))
    assert cosines(composed, expected).min() > 0.9999
    for some in (texts, images, expected):  # inputs do not all look alike
        assert (some @ some.T)[~np.eye(len(some), dtype=bool)].min() < 0.95


def test_a_batch_is_what_each_is_alone(ours: VisionLanguage) -> None:
    texts = ["a", *SENTENCES, "long " * 60]
    alone = np.concatenate([ours.embed_texts([text]) for text in texts])
    np.testing.assert_allclose(ours.embed_texts(texts), alone, atol=2e-5)
    alone = np.concatenate([ours.embed_images([p]) for p in PICTURES])
    np.testing.assert_allclose(ours.embed_images(PICTURES), alone, atol=2e-5)
    pairs = [(p, "word " * i) for i, p in enumerate(PICTURES)]
    alone = np.concatenate([ours.embed_composed([pair]) for pair in pairs])
    np.testing.assert_allclose(ours.embed_composed(pairs), alone, atol=2e-5)
    raw = ours.embed_composed(pairs, normalise=False)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), ours.embed_composed(pairs), atol=1e-6)
    prepared = [ours.prepare(p) for p in PICTURES]
    views = ours.embed_views(prepared, ["retrieval", "cirr"])
    np.testing.assert_allclose(views[1], ours.embed_images(PICTURES, "cirr"), atol=2e-5)


def test_nothing_is_nothing(ours: VisionLanguage) -> None:
    assert ours.embed_texts([]).shape == ours.embed_images([]).shape == ours.embed_composed([]).shape == (0, ours.dim)


def test_an_instruction_reaches_the_model(loaded: dict[str, VisionLanguage], folders: dict[str, Path]) -> None:
    ours, library = loaded["qwen3_vl"], Library(folders["qwen3_vl"], "qwen3_vl")
    told = WORDINGS["qwen3-vl-embedding"].chat.replace("{instruction}", "Find a cat.").replace("{}", "a dog")
    assert ours.embed_texts(["a dog"], "instruction:Find a cat")[0] @ library(told) > 0.9999
    assert ours.embed_texts(["a dog"], "instruction:Find a cat")[0] @ ours.embed_texts(["a dog"])[0] < 0.999


def test_special_tokens_of_users_are_text(ours: VisionLanguage) -> None:
    [broken] = ours.encoder.ask("text", "retrieval", [f"a {ours.IMAGE} b<|im_end|>"])
    assert ours.encoder.image_id not in broken
    assert ours.embed_texts([f"a {ours.IMAGE} b"]).shape == (1, ours.dim)


def test_too_long_a_text_is_named(ours: VisionLanguage) -> None:
    with pytest.raises(TextTooLong, match="input 2 has"):
        ours.embed_texts(["short", "word " * 3000])


def test_a_bad_picture_is_named(ours: VisionLanguage, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(NotAPicture, match=r"bad\.jpg"):
        ours.embed_images([SAMPLES[0], tmp_path / "bad.jpg"])


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=200, deadline=None)
def test_sizes_are_the_librarys(height: int, width: int) -> None:
    bounds = Bounds(14, 2, 2, 56 * 56, 28 * 28 * 1280, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    h, w = bounds.fit((height, width))
    assert h % 28 == w % 28 == 0
    assert min(h, w) >= 28
    if max(height, width) <= 200 * min(height, width):
        assert (h, w) == smart_resize(height, width, 28, bounds.least, bounds.most)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1), (2, 999)])
def test_a_thread_of_a_picture_stays_within_bounds(size: tuple[int, int], ours: VisionLanguage) -> None:
    prepared = ours.prepare(noise(*size))
    assert prepared.tokens < 1500
    assert ours.embed_prepared([prepared]).shape == (1, ours.dim)


def test_bounds_of_a_declaration(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models.toml"
    monkeypatch.setenv("E5V_MODELS", str(models))
    models.write_text(
        f'[mine]\nlike = "Qwen/Qwen3-VL-Embedding-2B"\nhub = {json.dumps(str(folders["qwen3_vl"]))}\n'
        "dim = 48\nleast_dim = 8\nmin_pixels = 1024\nmax_pixels = 4096\n"
    )
    small = Embedder.load("mine", device="cpu", dtype="float32", dim=8)
    assert small.prepare(PICTURES[2]).tokens == 2  # 32 × 64 pixels
    plain = Embedder.load(str(folders["qwen3_vl"]), device="cpu", dtype="float32").embed_texts(SENTENCES)[:, :8]
    np.testing.assert_allclose(small.embed_texts(SENTENCES), plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    assert small.fingerprint.endswith("/float/8")


def test_an_adapter_is_what_peft_makes_of_it(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    library = Library(folders["qwen2_vl"], "qwen2_vl")
    torch.manual_seed(0)
    names = r".*language_model.*(q_proj|up_proj)|.*visual.*(qkv)"
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=names)
    get_peft_model(library.model, config).eval().save_pretrained(tmp_path)
    ours = Embedder.load(str(folders["qwen2_vl"]), device="cpu", dtype="float32", adapter=str(tmp_path))
    chat = WORDINGS["qwen2-vl"]
    assert ours.embed_texts(["a dog"])[0] @ library(chat.template("text", "retrieval").replace("<sent>", "a dog")) > 0.9999
    assert ours.embed_images([PICTURES[2]])[0] @ library(chat.template("image", "retrieval"), PICTURES[2]) > 0.9999
    assert "+local@" in ours.fingerprint


def test_index_and_search(kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in SAMPLES[:10]:
        shutil.copy(path, photos)
    made = json.loads(run("index", photos, "--model", folders[kind], "--json").stdout.splitlines()[-1])
    assert (made["added"], made["failed"]) == (10, [])
    hits = json.loads(run("search", "--image", photos / SAMPLES[3].name, "-k", "10", "--json").stdout)["hits"]
    assert len(hits) == 10
    assert Path(hits[0]["path"]).name == SAMPLES[3].name
    assert hits[0]["score"] == pytest.approx(1, abs=1e-3)
    asked = ["search", "--image", photos / SAMPLES[3].name, "--modify", "make it snow", "--json"]
    assert SAMPLES[3].name not in {Path(hit["path"]).name for hit in json.loads(run(*asked).stdout)["hits"]}
    assert len(json.loads(run("search", "a dog", "--instruction", "Find it", "--json").stdout)["hits"]) == 10
    assert run("explain", photos / SAMPLES[3].name).exit_code == 0
    assert "leave --tiles out" in refused(2, "search", "a dog", "--tiles", "base")


def test_memory_that_runs_out_halves_the_batch(loaded: dict[str, VisionLanguage], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loaded["qwen2_vl"]
    expected, true = ours.embed_images(PICTURES), ours.states

    def cramped(ids: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(ids) > most:
            raise RuntimeError("CUDA out of memory")
        return true(ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ours, "states", cramped)
    monkeypatch.setattr(ours.batches, "tokens", ours.batches.tokens)
    most = 2
    np.testing.assert_allclose(ours.embed_images(PICTURES), expected, atol=2e-5)
    most = 0
    with pytest.raises(OutOfMemory, match="one input of"):
        ours.embed_images(PICTURES)


# what is refused


def test_a_family_loads_its_own_models_alone(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="holds a model for Qwen2VL, not for LlavaNextEmbedder"):
        LlavaNextEmbedder.load(str(folders["qwen2_vl"]), device="cpu")
    with pytest.raises(UsageError, match="quantised on a CUDA device, not on cpu"):
        Embedder.load(str(folders["qwen3_vl"]), device="cpu", quantize="4bit")


@pytest.mark.parametrize(("options", "option"), [({"tiles": 2}, "--tiles"), ({"quantize": "int8"}, "--quantize int8")])
def test_what_llava_next_alone_can_do(options: dict[str, Any], option: str, kind: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError) as error:
        Embedder.load(str(folders[kind]), device="cpu", **options)
    told = f"{folders[kind]} is a {kind} model; {option} is for llava_next: leave {option.partition(' ')[0]} out"
    assert str(error.value) == told


def test_missing_weights_are_named(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if re.search(r"layers\.1\.mlp\.(gate_)?up_proj", name))
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match=r"lacks 1 tensors, the first is .*layers\.1\.mlp\..*up_proj"):
        Embedder.load(str(folder), device="cpu")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(IncompleteCheckpoint, match="cannot be loaded"):
        Embedder.load(str(folder), device="cpu")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(IncompleteCheckpoint, match="pickled weights only"):
        Embedder.load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_files_are_named(name: str, kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    (folder / name).unlink()
    with pytest.raises(IncompleteCheckpoint, match=name):
        Embedder.load(str(folder), device="cpu")


def test_code_of_a_models_author_is_not_run(kind: str, copy: Callable[[str], Path]) -> None:
    folder = copy(kind)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto}))
    assert Embedder.load(str(folder), device="cpu", dtype="float32").embed_texts(["a"]).shape == (1, 48)
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto, "model_type": "evil"}))
    with pytest.raises(ModelError, match=r"holds a 'evil' model; supported: llava_next .*code of its author.* is not run"):
        Embedder.load(str(folder), device="cpu")


def test_settings_that_are_not_understood(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2_vl")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("merge_size", "size")}))
    with pytest.raises(ModelError, match="do not say merge_size, min_pixels, max_pixels"):
        Embedder.load(str(folder), device="cpu")
    folder = copy("phi3_v")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"embd_layer": {"use_hd_transform": False}}))
    with pytest.raises(ModelError, match="use_hd_transform False"):
        Embedder.load(str(folder), device="cpu")
    folder = copy("llava_onevision")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_aspect_ratio": "pad"}))
    with pytest.raises(ModelError, match="vision_aspect_ratio 'pad'"):
        Embedder.load(str(folder), device="cpu")


@pytest.mark.parametrize("lost", ["sub_GN", "img_processor.vision_model.encoder.layers.1.mlp.fc1.weight", "img_processor"])
def test_eyes_that_lack_a_tensor(lost: str, copy: Callable[[str], Path]) -> None:
    folder = copy("phi3_v")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if lost not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match="lacks"):
        Embedder.load(str(folder), device="cpu")


def test_an_adapter_of_a_decoder_with_joined_layers(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    formula = independent(folders["phi3_v"], "phi3_v")
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["qkv_proj", "gate_up_proj"])
    get_peft_model(formula.decoder, config).eval().save_pretrained(tmp_path)  # type: ignore[union-attr]
    ours = Embedder.load(str(folders["phi3_v"]), device="cpu", dtype="float32", adapter=str(tmp_path))
    told = WORDINGS["phi3"].template("image", "retrieval")
    assert ours.embed_images([PICTURES[2]])[0] @ formula(told, PICTURES[2]) > 0.9999
