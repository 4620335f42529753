"""Adapters merged on load, against peft on transformers' own model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from command_line import refused, run
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from e5v_search.backbones import Embedder
from e5v_search.backbones.adapters import CONFIG, WEIGHTS
from e5v_search.errors import IncompleteCheckpoint, ModelError, UnknownModel, UsageError
from e5v_search.prompts import LLAMA3_CHAT, MISTRAL_CHAT, PROMPT_SETS

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("replicas")
    return {name: replica.build(base / name, mistral=name == "mistral") for name in ("llama", "mistral")}


@pytest.fixture(scope="module")
def adapter(folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the language model alone, and far from nothing."""
    plain = replica.PlainFormula(folders["llama"][1])
    return adapted(plain, tmp_path_factory.mktemp("adapter"), bare=True)


def adapted(plain: replica.PlainFormula, folder: Path, bare: bool = False) -> Path:
    """A random adapter in `folder`; `plain` has it from now on."""
    torch.manual_seed(3)
    if bare:
        model = LlamaForCausalLM(plain.model.config.text_config)
        model.model = plain.model.model.language_model
    else:
        model = plain.model
    names = r".*language_model.*\.(q|v|down)_proj" if not bare else ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False, target_modules=names)
    get_peft_model(model, config).eval().save_pretrained(folder)
    return folder


def load(folder: Path, **options: object) -> Embedder:
    return Embedder.load(str(folder), device="cpu", dtype="float32", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "bare"), [("llama", False), ("llama", True), ("mistral", False)])
def test_equals_peft(family: str, bare: bool, folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    published, current = folders[family]
    plain = replica.PlainFormula(current)
    chat = LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT
    adapted(plain, tmp_path, bare)
    keys = list(load_file(tmp_path / WEIGHTS))
    assert all(key.startswith("base_model.model.model.layers." if bare else "base_model.model.model.language") for key in keys)
    ours = load(published, adapter=str(tmp_path))
    told = PROMPT_SETS["retrieval"]
    expected = [plain(chat.replace("{}", told.get("text").replace("<sent>", text))) for text in replica.SENTENCES]
    assert (ours.embed_texts(replica.SENTENCES) * expected).sum(axis=1).min() > 0.9999
    assert ours.embed_images([PICTURE])[0] @ plain(chat.replace("{}", told.get("image")), PICTURE) > 0.9999
    changed = chat.replace("{}", PROMPT_SETS["cirr"].get("composed").replace("<sent>", "more snow"))
    assert ours.embed_composed([(PICTURE, "more snow")])[0] @ plain(changed, PICTURE) > 0.9999
    without = load(published).embed_texts(replica.SENTENCES)
    assert (without * expected).sum(axis=1).max() < 0.99


def test_is_part_of_the_fingerprint(folders: dict[str, tuple[Path, Path]], adapter: Path, tmp_path: Path) -> None:
    folder = folders["llama"][0]
    ours = load(folder, adapter=str(adapter))
    assert ours.fingerprint.split("/")[0].split("+")[0] == load(folder).fingerprint.split("/")[0]
    assert "+local@" in ours.fingerprint
    moved = shutil.copytree(adapter, tmp_path / "moved")
    assert load(folder, adapter=str(moved)).fingerprint == ours.fingerprint
    save_file({key: 2 * value for key, value in load_file(moved / WEIGHTS).items()}, moved / WEIGHTS)
    assert load(folder, adapter=str(moved)).fingerprint != ours.fingerprint


def test_is_merged_before_weights_are_quantised(folders: dict[str, tuple[Path, Path]], adapter: Path) -> None:
    whole = load(folders["llama"][0], adapter=str(adapter)).embed_texts(replica.SENTENCES)
    small = load(folders["llama"][0], adapter=str(adapter), quantize="int8").embed_texts(replica.SENTENCES)
    assert (whole * small).sum(axis=1).min() > 0.99


def test_from_the_hub(
    folders: dict[str, tuple[Path, Path]], adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(adapter, tmp_path / f"models--me--lora/snapshots/{'a' * 40}")
    ours = load(folders["llama"][0], adapter=f"me/lora@{'a' * 40}")
    assert "+me/lora@aaaaaaaaaaaa/" in ours.fingerprint
    np.testing.assert_array_equal(ours.embed_texts(["a"]), load(folders["llama"][0], adapter=str(adapter)).embed_texts(["a"]))
    with pytest.raises(ModelError, match="me/other is not on this machine"):
        load(folders["llama"][0], adapter="me/other")


def test_a_collection_remembers_it(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    folder, _ = replica.build(tmp_path / "model")
    samples = Path(__file__).parent.parent / "e5v_search/samples"
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(samples.glob("*.*g"))[:10]:
        shutil.copy(path, photos)
    made = run("index", photos, "--model", folder, "--adapter", adapter, "--tiles", "base", "--json")
    assert json.loads(made.stdout.splitlines()[-1])["added"] == 10
    found = json.loads(run("search", "a cat", "--json").stdout)
    assert "+local@" in found["fingerprint"]
    assert len(found["hits"]) == 10
    assert json.loads(run("search", "a cat", "--json", "--model", folder).stdout)["hits"] == found["hits"]
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    save_file({key: 2 * value for key, value in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    assert "was made by" in refused(3, "search", "a cat", "--model", folder, "--adapter", other)


def test_what_is_refused(folders: dict[str, tuple[Path, Path]], adapter: Path, tmp_path: Path) -> None:
    folder = folders["llama"][0]
    with pytest.raises(UnknownModel, match=r"no adapter \./none"):
        load(folder, adapter="./none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompleteCheckpoint, match=r"has no adapter_config\.json"):
        load(folder, adapter=str(tmp_path / "empty"))
    half = shutil.copytree(adapter, tmp_path / "half")
    (half / WEIGHTS).rename(half / "adapter_model.bin")
    with pytest.raises(IncompleteCheckpoint, match=r"has no adapter_model.safetensors: not a whole adapter \(pickled"):
        load(folder, adapter=str(half))
    strange = shutil.copytree(adapter, tmp_path / "strange")
    tensors = load_file(strange / WEIGHTS)
    save_file({key.replace("layers.0.", "layers.70."): value for key, value in tensors.items()}, strange / WEIGHTS)
    with pytest.raises(ModelError, match=r"belongs to another model: this one has no language_model.layers.70"):
        load(folder, adapter=str(strange))
    wide = {key: torch.cat((value, value), 1) if "lora_A" in key else value for key, value in tensors.items()}
    save_file(wide, strange / WEIGHTS)
    with pytest.raises(ModelError, match=r"belongs to another model: language_model\.layers\.0"):
        load(folder, adapter=str(strange))
    (strange / CONFIG).write_text(json.dumps(json.loads((strange / CONFIG).read_text()) | {"use_dora": True}))
    with pytest.raises(ModelError, match="no plain LoRA"):
        load(folder, adapter=str(strange))


def test_a_model_with_two_towers_takes_none(tmp_path: Path, adapter: Path) -> None:
    import towers

    with pytest.raises(UsageError, match=r"--adapter is for llava_next, .*: leave --adapter out"):
        load(towers.build(tmp_path / "clip", "clip"), adapter=str(adapter))
