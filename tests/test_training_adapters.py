"""Adapters and trained weights on disk, against peft and transformers; killed and cut short."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor

from e5v_search.backbones import Embedder
from e5v_search.backbones.adapters import CONFIG, WEIGHTS, read_adapter
from e5v_search.errors import DiskFull, E5VError, IncompleteCheckpoint, ModelError, UsageError
from e5v_search.prompts import LLAMA3_CHAT, MISTRAL_CHAT, PROMPT_SETS
from e5v_search.training.adapters import load_adapter, save_adapter
from e5v_search.training.merging import merge, save_weights
from e5v_search.training.tuned import Lora, Parts, Tuned

TEXTS = [*replica.SENTENCES, "a"]
LORA = Lora(rank=4, alpha=8, dropout=0.1)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("replicas")
    return {name: replica.build(base / name, mistral=name == "mistral") for name in ("llama", "mistral")}


@pytest.fixture(scope="module")
def folder(folders: dict[str, tuple[Path, Path]]) -> Path:
    return folders["llama"][0]


def adapted(folder: Path, lora: Lora | None = LORA, parts: Parts = "language") -> Tuned:
    """A model that has learnt something, without dropout."""
    tuned = Tuned.load(str(folder), parts=parts, device="cpu", dtype="float32", lora=lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if "lora_B" in name or lora is None:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.train(False)
    return tuned


@torch.no_grad()
def vectors(tuned: Tuned) -> Tensor:
    return tuned.texts(TEXTS, max_tokens=1000)


@torch.no_grad()
def theirs(model: torch.nn.Module, current: Path, chat: str = LLAMA3_CHAT) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(current)
    prompt = chat.replace("{}", PROMPT_SETS["sts"].get("text"))
    rows = [tokenizer(prompt.replace("<sent>", text), return_tensors="pt") for text in TEXTS]
    return torch.cat([model(**row, output_hidden_states=True).hidden_states[-1][:, -1] for row in rows])


def whole_model(folder: Path) -> LlavaNextForConditionalGeneration:
    return LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


# adapters


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peft_puts_a_saved_adapter_on_transformers_model(
    family: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from peft import PeftModel

    published, current = folders[family]
    tuned = adapted(published)
    save_adapter(tuned, tmp_path)
    model = PeftModel.from_pretrained(whole_model(current), tmp_path).eval()
    assert not [w for w in recwarn if "missing" in str(w.message) or "unexpected" in str(w.message)]
    learnt = vectors(tuned)
    assert torch.allclose(
        theirs(model, current, LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT), learnt, atol=1e-4, rtol=1e-5
    )
    with model.disable_adapter():
        assert not torch.allclose(theirs(model, current), learnt, atol=0.1)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(published)


def test_a_saved_adapter_is_loaded_to_train_on(folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder)
    save_adapter(tuned, tmp_path)
    again = Tuned.load(str(folder), device="cpu", dtype="float32", lora=LORA, seed=5)
    again.train(False)
    load_adapter(again, tmp_path)
    assert torch.equal(vectors(again), vectors(tuned))
    assert all(parameter.requires_grad for parameter in again.trainable().values())
    for other in (Lora(rank=2, alpha=4), Lora(rank=4, alpha=4), None):
        with pytest.raises(UsageError, match=r"adapter of rank 4, scale 2, the model's is"):
            load_adapter(Tuned.load(str(folder), device="cpu", dtype="float32", lora=other), tmp_path)
    with pytest.raises(UsageError, match="no adapter"):
        save_adapter(adapted(folder, None), tmp_path)


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.language_model.layers.",  # transformers 5
        "base_model.model.language_model.model.layers.",  # 4.41
        "base_model.model.language_model.layers.",  # LlavaNextModel of today
        "base_model.model.model.layers.",  # the language model alone, with its head
        "base_model.model.layers.",  # and without
    ],
)
def test_names_of_every_kind_of_adapter_are_known(prefix: str, folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder)
    save_adapter(tuned, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    first = "base_model.model.model.language_model.layers."
    assert all(key.startswith(first) for key in tensors)
    save_file({key.replace(first, prefix): value for key, value in tensors.items()}, tmp_path / WEIGHTS)
    again = Tuned.load(str(folder), device="cpu", dtype="float32", lora=LORA)
    again.train(False)
    load_adapter(again, tmp_path)
    assert torch.equal(vectors(again), vectors(tuned))


def test_an_adapter_that_peft_trained_on_the_language_model_alone_is_merged(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    published, current = folders["llama"]
    whole = whole_model(current)
    bare = LlamaForCausalLM(whole.config.text_config)
    bare.model.load_state_dict(whole.model.language_model.state_dict())
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False, target_modules=names)
    model = get_peft_model(bare, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert all(key.startswith("base_model.model.model.layers.") for key in load_file(tmp_path / "adapter" / WEIGHTS))
    merge(str(published), tmp_path / "adapter", tmp_path / "merged")
    merged = Tuned.load(str(tmp_path / "merged"), device="cpu", dtype="float32")
    assert torch.nn.functional.cosine_similarity(theirs(model, current), vectors(merged)).min() > 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "no plain LoRA adapter .use_dora"),
        ({"bias": "all"}, "no plain LoRA adapter .bias"),
        ({"peft_type": "IA3"}, "'IA3' adapter; only LoRA"),
        ({"r": 8}, "not of rank 8"),
    ],
)
def test_other_adapters_are_refused_by_name(change: dict[str, object], message: str, folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(folder), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


def test_half_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder)
    save_adapter(tuned, tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    key = next(iter(good))
    save_file({k: v for k, v in good.items() if k != key}, tmp_path / WEIGHTS)
    with pytest.raises(IncompleteCheckpoint, match="is not whole"):
        load_adapter(tuned, tmp_path)
    layer = key.rpartition(".lora_")[0]
    save_file({k: v for k, v in good.items() if not k.startswith(layer)}, tmp_path / WEIGHTS)
    with pytest.raises(IncompleteCheckpoint, match="lacks 2 tensors"):
        load_adapter(tuned, tmp_path)
    save_file(good | {"base_model.model.lm_head.weight": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"lm_head\.weight is no part of a plain LoRA"):
        load_adapter(tuned, tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:500])
    with pytest.raises(IncompleteCheckpoint, match="truncated or damaged"):
        load_adapter(tuned, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(IncompleteCheckpoint, match="not a whole adapter"):
        load_adapter(tuned, tmp_path)


def test_a_folder_keeps_one_kind_of_adapter(folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder)
    save_adapter(tuned, tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(UsageError, match="adapter of another kind"):
        save_adapter(adapted(folder, Lora(rank=2)), tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


# full folders


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("layout", ["published", "current"])
def test_a_merged_model_is_opened_by_us_and_by_transformers(
    family: str, layout: str, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base = folders[family][layout == "current"]
    chat = LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT
    tuned = adapted(base)
    save_adapter(tuned, tmp_path / "adapter")
    out = tmp_path / "merged"
    merge(str(base), tmp_path / "adapter", out)

    learnt = torch.nn.functional.normalize(vectors(tuned), dim=1).numpy()
    ours = Embedder.load(str(out), device="cpu", dtype="float32")
    assert (ours.embed_texts(TEXTS, "sts") * learnt).sum(axis=1).min() > 0.9999  # merged weights are float16
    model, processor = whole_model(out), LlavaNextProcessor.from_pretrained(out, backend="pil")
    np.testing.assert_allclose(
        torch.nn.functional.normalize(theirs(model, out, chat), dim=1), ours.embed_texts(TEXTS, "sts"), atol=1e-5
    )
    prompt = chat.replace("{}", PROMPT_SETS["retrieval"].get("image"))
    inputs = processor(text=[prompt], images=[PICTURE], return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
    np.testing.assert_allclose(torch.nn.functional.normalize(hidden, dim=1), ours.embed_images([PICTURE]), atol=1e-5)

    old = {k: v for path in base.glob("*.safetensors") for k, v in load_file(path).items()}
    new = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    assert old.keys() == new.keys()
    assert {path.name for path in base.glob("*.safetensors")} == {path.name for path in out.glob("*.safetensors")}
    changed = {k for k in old if not torch.equal(old[k], new[k][: len(old[k])])}
    assert len(changed) == 3 * 7
    assert all(new[k].dtype == old[k].dtype for k in old)
    card = (out / "README.md").read_text()
    assert base.name in card
    assert "licence" in card
    assert not (out / "README-base.md").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_merging_has_one_tensor_in_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the next tensor is read, only the last one may still be there."""
    import weakref

    from e5v_search.training import merging

    alive: list[weakref.ref[Tensor]] = []
    most = 0
    true = merging._tensor

    def watched(*arguments: object) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = true(*arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(merging, "_tensor", watched)
    save_adapter(adapted(folder), tmp_path / "adapter")
    merge(str(folder), tmp_path / "adapter", tmp_path / "merged")
    assert len(alive) > 50
    assert most <= 1


@pytest.mark.parametrize("parts", ["language", "all"])
def test_weights_that_were_all_trained_become_a_folder(parts: Parts, folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder, None, parts)
    out = tmp_path / "out"
    out.mkdir()  # empty: may be filled
    save_weights(tuned, out)
    ours = Embedder.load(str(out), device="cpu", dtype="float32")
    learnt = torch.nn.functional.normalize(vectors(tuned), dim=1).numpy()
    assert (ours.embed_texts(TEXTS, "sts") * learnt).sum(axis=1).min() > 0.9999
    before, after = (Embedder.load(str(f), device="cpu", dtype="float32") for f in (folder, out))
    assert not np.allclose(before.embed_images([PICTURE]), after.embed_images([PICTURE]), atol=1e-3)
    towers = [e.model.vision_tower.pre_layrnorm.weight for e in (before, after)]  # type: ignore[attr-defined]
    assert torch.equal(*towers) == (parts == "language")
    assert whole_model(out)
    # the first base's card goes along, through any number of models made from it
    (out / "README.md").write_text("Be kind.")
    for source, made in ((out, tmp_path / "second"), (tmp_path / "second", tmp_path / "third")):
        save_weights(adapted(source, None), made)
        assert (made / "README-base.md").read_text() == "Be kind."
        assert "README-base.md" in (made / "README.md").read_text()
    with pytest.raises(UsageError, match="save_adapter"):
        save_weights(adapted(folder), tmp_path / "other")


def test_what_does_not_fit_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(folder), tmp_path / "adapter")
    good = load_file(tmp_path / "adapter" / WEIGHTS)
    for change, message in (
        ({k.replace("layers.2", "layers.7"): v for k, v in good.items()}, r"no language_model\.layers\.7"),
        ({k: v[:, :5].contiguous() if "lora_A" in k else v for k, v in good.items()}, "in the base model, not"),
    ):
        save_file(change, tmp_path / "adapter" / WEIGHTS)
        with pytest.raises(ModelError, match=message):
            merge(str(folder), tmp_path / "adapter", tmp_path / "out")
    save_file(good, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UsageError, match="is there already"):
        merge(str(folder), tmp_path / "adapter", tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


# the disk and the clock


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SAVES = """
import sys
from pathlib import Path
import torch
from e5v_search.training.adapters import save_adapter
from e5v_search.training.tuned import Lora, Tuned
tuned = Tuned.load(sys.argv[1], device="cpu", dtype="float32", lora=Lora(rank=4, alpha=8))
for n in range(1, 1_000_000):
    for parameter in tuned.trainable().values():
        parameter.data.fill_(n)
    save_adapter(tuned, Path(sys.argv[2]))
    print(n, flush=True)
"""


def saved(folder: Path) -> int:
    """The number of the save that lies in `folder`: all its tensors are of that one."""
    [n] = {float(v) for factors in read_adapter(folder).factors.values() for f in factors for v in f.unique()}
    return int(n)


def test_a_save_that_is_killed_leaves_the_last_one(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVES, str(folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for n in range(1, 4):
            assert int(process.stdout.readline()) == n
        for pause in np.random.default_rng(0).uniform(0, 0.02, 15):
            process.send_signal(signal.SIGSTOP)  # what lies there now is what a kill would leave
            said = saved(tmp_path)
            process.send_signal(signal.SIGCONT)
            time.sleep(pause)
            assert said >= 3
        process.kill()
        told = [int(line) for line in process.stdout.read().split()]
    assert saved(tmp_path) in (told[-1], told[-1] + 1)


def test_a_full_disk_leaves_the_last_save(folder: Path, tmp_path: Path) -> None:
    tuned = adapted(folder)
    save_adapter(tuned, tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS).read_bytes()
    with room_for(20_000), pytest.raises(DiskFull, match=r"no space left on the disk of .* what was saved before is whole"):
        save_adapter(tuned, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]


def test_a_merge_is_there_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    save_adapter(adapted(folder), tmp_path / "adapter")
    out = tmp_path / "out"
    with room_for(100_000), pytest.raises(DiskFull):
        merge(str(folder), tmp_path / "adapter", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    # a merge that was killed: what it left is cleared away by the next
    half = tmp_path / "out.partial"
    half.mkdir()
    (half / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (half / "foreign").write_bytes(b"")
    merge(str(folder), tmp_path / "adapter", out)
    assert not half.exists()
    assert not (out / "foreign").exists()
    assert Embedder.load(str(out), device="cpu").dim == 64


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), KeyboardInterrupt()]
)
def test_a_merge_that_fails_at_any_file_leaves_nothing(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(folder), tmp_path / "adapter")
    true, calls = os.fsync, 0
    for failing in range(1, 9):
        calls = 0

        def broken(handle: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise error
            true(handle)

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises((E5VError, KeyboardInterrupt)) as raised:
            merge(str(folder), tmp_path / "adapter", tmp_path / "out")
        assert isinstance(raised.value, DiskFull) == (getattr(error, "errno", 0) == 28)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
