"""The words nearest to an embedding, against a plain formula over the checkpoint's own file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from e5v_search.backbones import Embedder
from e5v_search.backbones.vocabulary import Vocabulary
from e5v_search.embedder import Word
from e5v_search.errors import IncompleteCheckpoint, UsageError

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(zip(("published", "current"), replica.build(tmp_path_factory.mktemp("replica")), strict=True))


def stored(folder: Path, name: str) -> torch.Tensor:
    """The tensor whose name ends so."""
    [tensor] = [v for path in folder.glob("*.safetensors") for k, v in load_file(path).items() if k.endswith(name)]
    return tensor


def replace(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Another tensor in its place, or none."""
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        for key in [key for key in held if key.endswith(name)]:
            del held[key]
            save_file(held | ({} if tensor is None else {key: tensor}), path, metadata={"format": "pt"})


def by_the_formula(rows: np.ndarray, tokenizer: Tokenizer, x: np.ndarray, k: int) -> list[tuple[str, float]]:
    """For tokens as byte-level BPE writes them, ASCII alone: Ġ is the blank."""
    best: dict[str, tuple[bool, float]] = {}
    for token, row in enumerate(rows[: tokenizer.get_vocab_size()]):
        written = tokenizer.id_to_token(token)
        text = written.replace("Ġ", " ")
        if (written.startswith("<") and len(written) > 1) or not text.isascii() or not text.strip():
            continue
        score = float(row @ x / np.linalg.norm(row) / np.linalg.norm(x))
        whole, top = best.get(text.strip().lower(), (False, -2.0))
        best[text.strip().lower()] = (whole or (text[0] == " " and text[1:].isalpha()), max(top, score))
    ranked = sorted(best.items(), key=lambda item: (not item[1][0], -item[1][1]))
    return [(word, score) for word, (_, score) in ranked[:k]]


@pytest.mark.parametrize("layout", ["published", "current"])
def test_equals_the_plain_formula(layout: str, folders: dict[str, Path]) -> None:
    embedder = Embedder.load(str(folders[layout]), device="cpu", dtype="float32")
    rows = stored(folders[layout], HEAD).float().numpy()
    x = embedder.embed_texts(replica.SENTENCES)
    tokenizer = Tokenizer.from_file(str(folders[layout] / "tokenizer.json"))
    for said, row in zip(embedder.nearest_words(x, 60), x, strict=True):
        expected = by_the_formula(rows, tokenizer, row, 60)
        assert [word.text.lower() for word in said] == [word for word, _ in expected]
        np.testing.assert_allclose([word.score for word in said], [score for _, score in expected], atol=1e-5)


def test_a_head_that_says_what_it_was_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["published"], tmp_path / "told"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    x = Embedder.load(str(folder), device="cpu", dtype="float32").embed_texts(replica.SENTENCES[:2])
    head = stored(folder, HEAD) * 0.01
    dog, snow = (tokenizer.token_to_id(t) for t in ("Ġdog", "Ġsnow"))
    head[dog], head[snow] = torch.from_numpy(x).half() * torch.tensor([[0.5], [40.0]])  # their length does not matter
    replace(folder, HEAD, head)
    embedder = Embedder.load(str(folder), device="cpu", dtype="float32")
    first, second = embedder.nearest_words(x, 3)
    assert first[0] == Word("dog", pytest.approx(1, abs=1e-3))
    assert second[0] == Word("snow", pytest.approx(1, abs=1e-3))
    # stored in half precision, or not of length 1, it says the same
    again = embedder.nearest_words(7 * x.astype(np.float16), 3)
    assert [[w.text for w in row] for row in again] == [[w.text for w in row] for row in (first, second)]
    middle = x.sum(axis=0)
    assert {word.text for word in embedder.nearest_words(middle[None], 2)[0]} == {"dog", "snow"}


def test_without_a_head_the_input_table_speaks(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["current"], tmp_path / "headless"))
    replace(folder, HEAD, None)
    rows = stored(folder, TABLE).float().numpy()
    embedder = Embedder.load(str(folder), device="cpu", dtype="float32")
    [said] = embedder.nearest_words(rows[300:301], 60)
    expected = by_the_formula(rows, Tokenizer.from_file(str(folder / "tokenizer.json")), rows[300], 60)
    np.testing.assert_allclose([word.score for word in said], [s for _, s in expected], atol=1e-5)
    replace(folder, TABLE, None)
    with pytest.raises(IncompleteCheckpoint, match=r"holds no lm_head\.weight and no language_model\.embed_tokens\.weight"):
        Vocabulary.read(folder)


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_weights_have_the_same_words(quantize: str, folders: dict[str, Path]) -> None:
    plain, small = (Embedder.load(str(folders["published"]), device="cpu", quantize=q) for q in (None, quantize))
    x = np.random.default_rng(0).standard_normal((3, plain.dim))
    assert small.nearest_words(x) == plain.nearest_words(x)


# words by themselves

TOKENS = ["a", "▁dog", "dog", "▁Dog", "▁cat", "CAT", "ing", "▁12", "!", "▁", "▁é", "▁it's", "<eot>"]
WORDS = ["dog", "cat", "é", "a", "ing", "12", "!", "it's"]  # whole ones first


def byte_level() -> Tokenizer:
    tokens = [t.replace("▁", "Ġ").replace("é", "Ã©") for t in TOKENS[:-1]] + ["Ã"]  # the last is half a letter
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken("<eot>", special=True)])
    return tok


def sentencepiece() -> Tokenizer:
    """As LLaMA-2 and Mistral write it: the blank before the first word is not there when it is decoded."""
    tokens = ["<unk>", *TOKENS[:-1], "▁a", "<0xC3>"]
    tok = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<eot>", special=True)])
    return tok


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_spellings_of_a_word_are_one_word_and_whole_ones_come_first(make: type) -> None:
    tokenizer: Tokenizer = make()
    n = tokenizer.get_vocab_size()
    vocabulary = Vocabulary(torch.eye(n), tokenizer)
    words = [w.text for w in vocabulary.nearest(np.ones((1, n)), 99)[0]]
    assert sorted(words) == sorted(WORDS)
    whole = {"dog", "cat", "é"} | ({"a"} if make is sentencepiece else set())
    assert set(words[: len(whole)]) == whole
    assert vocabulary.whole == len(whole)
    for written, word in [("▁Dog", "dog"), ("dog", "dog"), ("CAT", "cat"), ("▁é", "é")]:
        x = np.zeros((1, n), np.float16)
        x[0, tokenizer.token_to_id(written if make is sentencepiece else written.replace("▁", "Ġ").replace("é", "Ã©"))] = 3
        assert vocabulary.nearest(x, 1) == [[Word(word, 1.0)]]


def test_rows_without_tokens_and_tokens_without_rows(folders: dict[str, Path]) -> None:
    tokenizer = byte_level()
    few, many = (Vocabulary(torch.eye(n, 20), tokenizer) for n in (5, 20))
    assert {w.text for w in few.nearest(np.ones((1, 20)), 99)[0]} == {"a", "dog", "cat"}
    assert sorted(w.text for w in many.nearest(np.ones((1, 20)), 99)[0]) == sorted(WORDS)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_shared_words_are_near_to_both(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    tokenizer = byte_level()
    vocabulary = Vocabulary(torch.from_numpy(rng.standard_normal((tokenizer.get_vocab_size(), 4))), tokenizer)
    a, *x = rng.standard_normal((4, 4))
    own, *near = [{w.text: w.score for w in row} for row in vocabulary.nearest(np.stack((a, *x)), 99)]
    shared = vocabulary.shared(a, np.stack(x), k)
    assert len(shared) == len(x)
    for said, theirs in zip(shared, near, strict=True):
        assert len(said) == min(k, len(WORDS))
        for word in said:
            assert word.score == pytest.approx(min(own[word.text], theirs[word.text]), abs=1e-6)
        ranks = [(WORDS.index(word.text) >= vocabulary.whole, -word.score) for word in said]
        assert ranks == sorted(ranks)


def test_vectors_of_another_model_are_refused(folders: dict[str, Path]) -> None:
    vocabulary = Vocabulary.read(folders["published"])
    with pytest.raises(UsageError, match=r"shape \(2, 63\) are not this model's: it makes \(n, 64\)"):
        vocabulary.nearest(np.ones((2, 63)))
    with pytest.raises(UsageError, match=r"it makes \(n, 64\)"):
        vocabulary.shared(np.ones(64), np.ones((1, 63)))
    assert vocabulary.nearest(np.empty((0, 64))) == []


def test_the_bundled_model_says_what_is_in_a_sentence() -> None:
    embedder = Embedder.load("e5v-tiny", device="cpu")
    x = embedder.embed_texts(["a football game", "a man rides a bike", "a red car", "they play football"])
    said = [[word.text for word in row] for row in embedder.nearest_words(x, 3)]
    assert ("football" in said[0], "bike" in said[1], "car" in said[2]) == (True, True, True)
    assert "football" in [word.text for word in embedder.shared_words(x[0], x[3:], 3)[0]]
