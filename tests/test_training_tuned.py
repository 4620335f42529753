"""A pretrained model that learns, against transformers' and peft's own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlavaNextForConditionalGeneration

from e5v_search.backbones import Embedder
from e5v_search.backbones.tiles import Tiles
from e5v_search.errors import IncompleteCheckpoint, ModelError, UsageError
from e5v_search.prompts import LLAMA3_CHAT, MISTRAL_CHAT, PROMPT_SETS
from e5v_search.training.tuned import Lora, Parts, Quirks, Tuned

TEXTS = [*replica.SENTENCES, "a", "! wow, snow!", "word " * 20]
LORA = Lora(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    base = tmp_path_factory.mktemp("replicas")
    return {name: replica.build(base / name, mistral=name == "mistral") for name in ("llama", "mistral")}


@pytest.fixture(scope="module")
def folder(folders: dict[str, tuple[Path, Path]]) -> Path:
    return folders["llama"][0]


def load(folder: Path, parts: Parts = "language", dtype: str = "float32", **options: object) -> Tuned:
    return Tuned.load(str(folder), parts=parts, device="cpu", dtype=dtype, **options)  # type: ignore[arg-type]


def photos(tuned: Tuned) -> list[Tiles]:
    sizes = [(100, 100), (333, 500), (5, 600)]
    rng = np.random.default_rng(0)
    return [tuned.prepare(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))) for size in sizes]


def disturb(tuned: Tuned) -> None:
    """Give an adapter something to say: at first its second factor is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def some_loss(x: Tensor) -> Tensor:
    """That depends on every row, and on their directions."""
    return (F.normalize(x, dim=1) @ torch.linspace(-1, 1, x.shape[1]) * torch.arange(1, len(x) + 1)).sum()


def gradients(tuned: Tuned, x: Tensor) -> dict[str, Tensor]:
    some_loss(x).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in tuned.trainable().items() if p.grad is not None}
    tuned.model.zero_grad(set_to_none=True)
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in a.values())
    assert scale > 1e-3
    for name in a:
        assert float((a[name] - b[name]).abs().max()) < tolerance * scale, name


# what is computed


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_embeds_as_the_engine_does(family: str, folders: dict[str, tuple[Path, Path]]) -> None:
    tuned = load(folders[family][0], parts="all")
    engine = Embedder.load(str(folders[family][0]), device="cpu", dtype="float32")
    tiles = photos(tuned)
    with torch.no_grad():
        pairs = [
            (tuned.texts(TEXTS, max_tokens=1000), engine.embed_texts(TEXTS, "sts")),
            (tuned.pictures(tiles), engine.embed_prepared(tiles)),
            (
                tuned.embed([*tuned.text_rows(TEXTS[:2], "cirr"), *tuned.picture_rows(tiles, "cirr")])[2:],
                engine.embed_prepared(tiles, "cirr"),
            ),
        ]
        change = "make it snow"
        image = Image.new("RGB", (90, 60), "red")
        composed = tuned.composed([tuned.prepare(image)], [change])
    for ours, expected in [*pairs, (composed, engine.embed_composed([(image, change)]))]:
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(F.normalize(ours, dim=1).numpy(), expected, atol=1e-5)


def test_the_order_of_rows_and_the_size_of_pieces_do_not_matter(folder: Path) -> None:
    tuned = load(folder, lora=LORA)
    whole = tuned.texts(TEXTS)
    tuned.encoder.batches.tokens = 50
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    pieces = tuned.texts([TEXTS[i] for i in order])
    assert torch.allclose(pieces, whole[order], atol=1e-4)


def test_a_sentence_is_cut_before_the_prompt_is_put_around_it(folder: Path) -> None:
    tuned = load(folder)
    tokens = tuned.encoder.tokenizer.encode("word " * 60, add_special_tokens=False)
    start = "word " * 60
    long, short = tuned.text_rows([start, start[: tokens.offsets[31][1]]])
    assert len(tokens) > 32
    assert long.ids == short.ids
    assert long.ids[-3:] == tuned.text_rows(["a"])[0].ids[-3:]
    # letters of several tokens
    [emoji] = tuned.text_rows(["🙂" * 30])
    assert emoji.length < 32 + 4 + tuned.text_rows([""])[0].length


def test_checkpointed_layers_give_the_same_gradients(folder: Path) -> None:
    plain, again = load(folder, parts="all"), load(folder, parts="all", checkpointing=True)
    seen: list[int] = []
    again.model.language_model.layers[1].input_layernorm.register_forward_hook(lambda *_: seen.append(1))
    for tuned in (plain, again):
        tuned.encoder.batches.tokens = 10_000
    rows = [*plain.text_rows(TEXTS), *plain.picture_rows(photos(plain))]
    assert_same(gradients(plain, plain.embed(rows)), gradients(again, again.embed(rows)), 1e-6)
    assert len(seen) == 2  # once forwards, once on the way back
    with torch.no_grad():
        assert torch.equal(plain.embed(rows), again.embed(rows))
    assert len(seen) == 3


# what learns


def whole_model(current: Path) -> LlavaNextForConditionalGeneration:
    return LlavaNextForConditionalGeneration.from_pretrained(current, dtype=torch.float32).train()


def theirs(model: torch.nn.Module, current: Path, texts: list[str], chat: str = LLAMA3_CHAT) -> Tensor:
    """The published formula, a text at a time, with gradients."""
    tokenizer = AutoTokenizer.from_pretrained(current)
    prompt = chat.replace("{}", PROMPT_SETS["sts"].get("text"))
    rows = [tokenizer(prompt.replace("<sent>", text), return_tensors="pt") for text in texts]
    return torch.cat([model(**row, output_hidden_states=True).hidden_states[-1][:, -1] for row in rows])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_all_weights_get_the_gradients_of_transformers_model(family: str, folders: dict[str, tuple[Path, Path]]) -> None:
    published, current = folders[family]
    tuned, model = load(published), whole_model(current)
    ours = gradients(tuned, tuned.texts(TEXTS, max_tokens=1000))
    some_loss(theirs(model, current, TEXTS, LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT)).backward()  # type: ignore[no-untyped-call]
    expected = {n.removeprefix("model."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    rows = len(ours["language_model.embed_tokens.weight"])
    expected["language_model.embed_tokens.weight"] = expected["language_model.embed_tokens.weight"][:rows]
    assert_same(ours, expected)


def test_an_adapter_gets_the_gradients_of_pefts(folders: dict[str, tuple[Path, Path]]) -> None:
    from peft import LoraConfig, get_peft_model

    published, current = folders["llama"]
    tuned = load(published, lora=LORA)
    disturb(tuned)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, exclude_modules=r".*vision_tower.*")
    wrapped = get_peft_model(whole_model(current), config)
    mine = tuned.trainable()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(mine.pop(name.removeprefix("base_model.model.model.")))
    assert not mine
    ours = gradients(tuned, tuned.texts(TEXTS, max_tokens=1000))
    some_loss(theirs(wrapped, current, TEXTS)).backward()  # type: ignore[no-untyped-call]
    expected = {n.removeprefix("base_model.model.model."): p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert len(ours) == 3 * 7 * 2
    assert_same(ours, expected)


def test_an_adapter_begins_as_the_model_and_from_its_seed(folder: Path) -> None:
    first, same, other = (load(folder, lora=LORA, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        assert torch.allclose(first.texts(TEXTS), load(folder).texts(TEXTS), atol=1e-5)
    a, b, c = (tuned.trainable() for tuned in (first, same, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if "lora_A" in name)


def test_dropout_is_there_in_training_alone(folder: Path) -> None:
    tuned = load(folder, lora=Lora(rank=4, dropout=0.5))
    disturb(tuned)
    with torch.no_grad():
        assert not torch.allclose(tuned.texts(TEXTS), tuned.texts(TEXTS), atol=1e-4)
        tuned.train(False)
        assert torch.equal(tuned.texts(TEXTS), tuned.texts(TEXTS))


def test_the_vision_tower_is_not_even_read(folder: Path, tmp_path: Path) -> None:
    poisoned = Path(shutil.copytree(folder, tmp_path / "poisoned"))
    for path in poisoned.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(path).items() if k.startswith("language_model.")}
        save_file(kept, path, metadata={"format": "pt"})
    index = json.loads((poisoned / "model.safetensors.index.json").read_text())
    assert any("vision" in key for key in index["weight_map"])
    tuned = load(poisoned, lora=LORA)
    assert len(gradients(tuned, tuned.texts(TEXTS))) == 3 * 7 * 2
    assert all(name.startswith("language_model.") for name, _ in tuned.model.named_parameters())
    with pytest.raises(IncompleteCheckpoint, match="lacks"):
        load(poisoned, parts="all")
    with pytest.raises(UsageError, match='pictures need parts="all"'):
        tuned.pictures(photos(tuned))


def test_pictures_teach_the_adapter_and_leave_the_tower_alone(folder: Path) -> None:
    tuned = load(folder, parts="all", lora=LORA)
    disturb(tuned)
    found = gradients(tuned, tuned.pictures(photos(tuned)))
    assert len(found) == 3 * 7 * 2
    tuned = load(folder, parts="all")
    found = gradients(tuned, tuned.pictures(photos(tuned)))
    assert float(found["vision_tower.embeddings.patch_embedding.weight"].abs().max()) > 0


@pytest.mark.parametrize("lora", [None, LORA])
def test_bfloat16_learns_in_float32(folder: Path, lora: Lora | None) -> None:
    exact, low = load(folder, lora=lora), load(folder, lora=lora, dtype="bfloat16")
    for tuned in (exact, low):
        disturb(tuned)
    assert {p.dtype for p in low.trainable().values()} == {torch.float32}
    frozen = {p.dtype for p in low.model.parameters() if not p.requires_grad}
    assert frozen == (set() if lora is None else {torch.bfloat16})
    a, b = exact.texts(TEXTS), low.texts(TEXTS)
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert float(F.cosine_similarity(a, b).detach().min()) > 0.99
    assert_same(gradients(exact, a), gradients(low, b), 0.2)


def test_four_bit_weights_and_an_adapter_on_them(folder: Path) -> None:
    tuned = load(folder, lora=LORA, quantize="nf4", checkpointing=True)
    linears = [m for m in tuned.model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    linears = [m for m in linears if type(m).__module__.startswith("bitsandbytes.")]
    assert len(linears) == 3 * 7
    assert {(m.weight.quant_type, m.weight.quant_state.nested) for m in linears} == {("nf4", True)}  # type: ignore[union-attr]
    # the same weights, unpacked into a plain model, give the same embeddings and the same gradients
    import bitsandbytes as bnb

    plain = load(folder, lora=LORA)
    for tuned_one in (tuned, plain):
        disturb(tuned_one)
    unpacked = dict(plain.model.named_modules())
    with torch.no_grad():
        for name, module in tuned.model.named_modules():
            if module in linears:
                weight = bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state)
                unpacked[name].weight.copy_(weight)  # type: ignore[operator, union-attr]
    a, b = plain.texts(TEXTS), tuned.texts(TEXTS)
    assert torch.allclose(a, b, atol=1e-3 * float(a.detach().abs().max()))
    assert_same(gradients(plain, a), gradients(tuned, b), 1e-3)
    before = some_loss(tuned.texts(TEXTS))
    optimiser = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        some_loss(tuned.texts(TEXTS)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert some_loss(tuned.texts(TEXTS)) < before - 0.1


def test_four_bit_layers_stay_ready_for_gradients_after_an_evaluation(folder: Path) -> None:
    tuned = load(folder, lora=LORA, quantize="nf4")
    disturb(tuned)
    expected = gradients(tuned, tuned.texts(TEXTS))
    tuned.train(False)
    packed = [m for m in tuned.model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    assert packed
    assert all(m.training for m in packed)
    with torch.no_grad():
        tuned.texts(TEXTS)
    tuned.train(True)
    assert_same(expected, gradients(tuned, tuned.texts(TEXTS)))


def test_what_cannot_be_tuned_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 bit do not learn"):
        load(folder, quantize="nf4")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="a 'clip' model; only LLaVA-NeXT"):
        load(tmp_path)
    assert Lora(0, 0, 1).problems() == ["rank: must be positive", "alpha: must be positive", "dropout: must lie in [0, 1)"]
    assert Lora().problems() == []


# the quirks of the published code


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("quirks", [Quirks(True), Quirks(False, True), Quirks(True, True)])
def test_quirks_are_those_of_the_published_code(family: str, quirks: Quirks, folders: dict[str, tuple[Path, Path]]) -> None:
    published, current = folders[family]
    chat = LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT
    template = chat.replace("{}", PROMPT_SETS["sts"].get("text"))
    if quirks.plain_template:
        template = template.replace("_", " ").strip()
    texts = [*TEXTS, "an under_score stays"]
    filled = [template.replace("<sent>", text) for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(current, padding_side="left")
    model = whole_model(current)
    if quirks.attend_pads:
        ids = tokenizer(filled, return_tensors="pt", padding=True)["input_ids"]
        expected = model(ids, attention_mask=ids > 0, output_hidden_states=True).hidden_states[-1][:, -1]
    else:
        rows = [tokenizer(text, return_tensors="pt") for text in filled]
        expected = torch.cat([model(**row, output_hidden_states=True).hidden_states[-1][:, -1] for row in rows])
    tuned = load(published, quirks=quirks)
    x = tuned.texts(texts, max_tokens=1000)
    assert torch.allclose(x, expected, atol=2e-4)
    plain = load(published).texts(texts, max_tokens=1000)
    changed = (F.cosine_similarity(x, plain) < 0.999).sum()
    assert changed > 0 or (family == "mistral" and not quirks.attend_pads)  # whose wrapper has nothing to lose


def test_attended_pads_checkpoint_too_and_need_a_pad(folder: Path, tmp_path: Path) -> None:
    quirks = Quirks(attend_pads=True)
    plain, again = load(folder, quirks=quirks), load(folder, quirks=quirks, checkpointing=True)
    assert_same(gradients(plain, plain.texts(TEXTS)), gradients(again, again.texts(TEXTS)), 1e-6)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "pad_token"}))
    with pytest.raises(UsageError, match="names no pad token"):
        load(copy, quirks=quirks)


def test_pictures_have_no_quirks(folder: Path) -> None:
    tuned = load(folder, parts="all", quirks=Quirks(plain_template=True))
    with pytest.raises(UsageError, match="pictures have none"):
        tuned.pictures(photos(tuned))
