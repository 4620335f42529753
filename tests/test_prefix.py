"""Composed queries with a memory of their pictures, against transformers' whole model and against a cold engine."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import noise
from PIL import Image
from vectors import cosines

from e5v_search.backbones import Embedder
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.prefix import Key, PrefixMemory, default_limit
from e5v_search.errors import NotAPicture, OutOfMemory, TextTooLong, UnreadableFile
from e5v_search.prompts import LLAMA3_CHAT, MISTRAL_CHAT, PROMPT_SETS

SIZES = [(56, 56), (333, 500), (1, 5000), (600, 5), (120, 40)]
PICTURES = [noise(h, w) for h, w in SIZES]
CHANGES = ["make it red", "a", "remove the dog, put two children in the snow; keep the rest as it is", "word " * 60]
# texts of many lengths over pictures of many lengths, some of them several times
PAIRS = [(picture, change) for change in CHANGES for picture in PICTURES]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return replica.build(tmp_path_factory.mktemp(family), mistral=family == "mistral")


@pytest.fixture(scope="module")
def loaded(folders: tuple[Path, Path]) -> LlavaNextEmbedder:
    embedder = Embedder.load(str(folders[0]), device="cpu", dtype="float32")
    assert isinstance(embedder, LlavaNextEmbedder)
    return embedder


@pytest.fixture
def ours(loaded: LlavaNextEmbedder) -> Iterator[LlavaNextEmbedder]:
    """With nothing in its memory."""
    tokens = loaded.batches.tokens
    loaded.memory = PrefixMemory(2**30)
    loaded.batches.relieve = loaded.memory.clear
    yield loaded
    loaded.batches.tokens = tokens


@pytest.fixture
def passes(ours: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures of each pass of the vision tower."""
    seen: list[int] = []
    true = ours.model.image_features
    monkeypatch.setattr(ours.model, "image_features", lambda x, sizes, grids: seen.append(len(sizes)) or true(x, sizes, grids))
    return seen


def one_by_one(embedder: LlavaNextEmbedder, pairs: list[tuple[Image.Image, str]], prompts: str = "cirr") -> np.ndarray:
    rows = []
    for pair in pairs:
        embedder.memory.clear()
        rows.append(embedder.embed_composed([pair], prompts)[0])
    embedder.memory.clear()
    return np.stack(rows)


@pytest.mark.parametrize("prompts", ["cirr", "fashioniq-dress"])
def test_from_memory_as_by_the_plain_formula(
    prompts: str, family: str, ours: LlavaNextEmbedder, folders: tuple[Path, Path], passes: list[int]
) -> None:
    plain = replica.PlainFormula(folders[1])
    wrapped = (LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT).replace("{}", PROMPT_SETS[prompts].get("composed"))
    expected = np.stack([plain(wrapped.replace("<sent>", change), picture) for picture, change in PAIRS])
    cold = ours.embed_composed(PAIRS, prompts)
    assert sum(passes) == len(PICTURES)
    warm = ours.embed_composed(PAIRS, prompts)
    assert sum(passes) == len(PICTURES)
    assert cosines(cold, expected).min() > 0.99999
    assert cosines(warm, expected).min() > 0.99999
    assert np.abs(expected @ expected.T)[~np.eye(len(expected), dtype=bool)].min() < 0.9


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_neither_order_nor_batches_nor_what_is_kept_matter(loaded: LlavaNextEmbedder, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(PAIRS) - 1), min_size=1, max_size=12))
    tokens, before = data.draw(st.integers(1, 3000)), loaded.batches.tokens
    loaded.memory = PrefixMemory(data.draw(st.integers(0, 2**18)))
    pairs = [PAIRS[i] for i in chosen]
    try:
        loaded.embed_composed(pairs[::2])
        loaded.batches.tokens = tokens
        x = loaded.embed_composed(pairs)
    finally:
        loaded.batches.tokens = before
    loaded.memory = PrefixMemory(0)
    assert cosines(x, one_by_one(loaded, pairs)).min() > 0.999999


def test_both_orders_of_two_captions_share_a_pass(ours: LlavaNextEmbedder, passes: list[int]) -> None:
    pairs = [(p, text) for p in PICTURES for text in ("is red, has long sleeves", "has long sleeves, is red")]
    ours.memory.limit = 0
    x = ours.embed_composed(pairs, "fashioniq-dress")
    assert sum(passes) == len(PICTURES)
    assert x.shape == (len(pairs), ours.dim)
    assert (ours.memory.hits, ours.memory.misses, len(ours.memory)) == (0, len(PICTURES), 0)


def test_a_known_file_is_neither_decoded_nor_looked_at_again(
    ours: LlavaNextEmbedder, passes: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"  # a JPEG may be decoded smaller than as a picture in memory
    PICTURES[1].save(path)
    first = ours.embed_composed([(path, "make it red")])
    assert (ours.memory.hits, ours.memory.misses, passes) == (0, 1, [1])
    with monkeypatch.context() as m:
        m.setattr(ours, "prepare", lambda image: pytest.fail("decoded again"))
        for again in (path, str(path), path.read_bytes()):
            np.testing.assert_allclose(ours.embed_composed([(again, "make it red")]), first, atol=1e-6)
    assert (ours.memory.hits, ours.memory.misses, passes) == (3, 1, [1])
    # the same pixels from elsewhere: decoded, but not looked at
    ours.embed_composed([(Image.open(path), "make it red")])
    assert (ours.memory.hits, passes) == (4, [1])
    # another prompt set begins alike in the paper's prompts
    ours.embed_composed([(path, "make it red")], "fashioniq-shirt")
    assert (ours.memory.hits, passes) == (5, [1])


def test_a_changed_file_never_gets_an_old_answer(ours: LlavaNextEmbedder, tmp_path: Path) -> None:
    path = tmp_path / "photo.bmp"
    path.write_bytes(b"")
    answers = []
    for colour in ("red", "green", "red"):
        Image.new("RGB", (80, 60), colour).save(path)
        os.utime(path, (1_000_000_000, 1_000_000_000))  # same name, size and time
        answers.append(ours.embed_composed([(path, "make it snow")])[0])
    expected = one_by_one(ours, [(Image.new("RGB", (80, 60), c), "make it snow") for c in ("red", "green", "red")])
    assert cosines(np.stack(answers), expected).min() > 0.999999
    assert answers[0] @ answers[1] < 0.9999
    path.write_bytes(b"no picture")
    with pytest.raises(NotAPicture, match=r"photo\.bmp"):
        ours.embed_composed([(path, "make it snow")])
    path.unlink()
    with pytest.raises(UnreadableFile, match=r"photo\.bmp"):
        ours.embed_composed([(path, "make it snow")])


@pytest.mark.parametrize("composed", ["A photo: <image> now <sent>!", "Do <sent> to <image> in one word:"])
def test_prompts_with_text_before_the_picture(
    composed: str, family: str, ours: LlavaNextEmbedder, folders: tuple[Path, Path], tmp_path: Path, passes: list[int]
) -> None:
    prompts = tmp_path / "own.toml"
    prompts.write_text(f'composed = "{composed}"\nimage = "Look: <image>"')
    plain = replica.PlainFormula(folders[1])
    wrapped = (LLAMA3_CHAT if family == "llama" else MISTRAL_CHAT).replace("{}", composed)
    pairs = [(PICTURES[1], text) for text in CHANGES]
    expected = np.stack([plain(wrapped.replace("<sent>", text), picture) for picture, text in pairs])
    x = ours.embed_composed(pairs, str(prompts))
    assert cosines(x, expected).min() > 0.99999
    # what the model sees of a picture depends on what stands before it
    assert sum(passes) == (1 if composed.startswith("A photo") else len(CHANGES))
    tiles = [ours.prepare(p) for p in PICTURES]
    views = ours.embed_views(tiles, [str(prompts), "retrieval", "cirr"])
    for view, some in zip([str(prompts), "retrieval", "cirr"], views, strict=True):
        assert cosines(some, ours.embed_prepared(tiles, view)).min() > 0.999999


def test_text_too_long_is_refused_with_its_place_warm_and_cold(ours: LlavaNextEmbedder) -> None:
    ours.encoder.max_tokens = 200
    try:
        for _ in range(2):
            ours.embed_composed([(PICTURES[0], "a")])
            with pytest.raises(TextTooLong, match=r"input 2 has \d+ tokens .* takes 200 at most"):
                ours.embed_composed([(PICTURES[0], "a"), (PICTURES[0], "word " * 300)])
    finally:
        ours.encoder.max_tokens = 1024


def test_memory_is_given_up_before_batches_are_halved(ours: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ours.embed_composed(PAIRS)
    true, tokens = ours.model.last_hidden, ours.batches.tokens

    def scarce(rows: list[torch.Tensor], prefixes: list[torch.Tensor] | None = None) -> torch.Tensor:
        if ours.memory.bytes or len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return true(rows, prefixes)

    most = 100
    monkeypatch.setattr(ours.model, "last_hidden", scarce)
    assert cosines(ours.embed_composed(PAIRS), expected).min() > 0.999999
    assert (len(ours.memory), ours.batches.tokens) == (0, tokens)
    most = 2
    assert cosines(ours.embed_composed(PAIRS), expected).min() > 0.999999
    assert ours.batches.tokens < tokens
    most = 0
    with pytest.raises(OutOfMemory, match="one input of"):
        ours.embed_composed(PAIRS[:1])


def test_threads_share_a_memory(ours: LlavaNextEmbedder) -> None:
    expected = one_by_one(ours, PAIRS)
    ours.memory.limit = 2**17  # some of the pictures
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda pair: ours.embed_composed([pair])[0], PAIRS * 3))
    assert cosines(np.stack(rows), np.tile(expected, (3, 1))).min() > 0.999999
    assert ours.memory.bytes <= ours.memory.limit


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantised_weights(quantize: str, folders: tuple[Path, Path]) -> None:
    small = Embedder.load(str(folders[0]), device="cpu", dtype="float32", quantize=quantize)
    assert isinstance(small, LlavaNextEmbedder)
    cold = small.embed_composed(PAIRS[:5])
    assert small.memory.misses == 5
    assert cosines(small.embed_composed(PAIRS[:5]), cold).min() > 0.9999
    assert small.memory.hits == 5


# the memory by itself


def prefix(n: int) -> torch.Tensor:
    return torch.zeros(1, 2, 1, n, 1)  # 8 bytes a token


@given(st.integers(0, 100), st.lists(st.tuples(st.sampled_from("pgc"), st.integers(0, 5), st.integers(1, 9)), max_size=40))
def test_least_recently_used_goes_first(limit: int, steps: list[tuple[str, int, int]]) -> None:
    memory, reference = PrefixMemory(limit), dict[int, int]()  # a dict keeps its order: the last is what was used last
    for step, name, n in steps:
        key = Key(str(name), (name,))
        if step == "p":
            memory.put(key, prefix(n))
            if 8 * n <= limit:
                reference.pop(name, None)
                reference[name] = 8 * n
                while sum(reference.values()) > limit:
                    del reference[next(iter(reference))]
        elif step == "g":
            got = memory.get(key)
            assert (got is not None) == (name in reference)
            if got is not None:
                assert got.nbytes == reference[name]
                reference[name] = reference.pop(name)
        else:
            assert memory.clear() == sum(reference.values())
            reference.clear()
        assert (len(memory), memory.bytes) == (len(reference), sum(reference.values()))
        assert memory.bytes <= limit


def test_default_limit_holds_a_photo_of_the_8b_model() -> None:
    assert default_limit(torch.device("cpu")) > 2340 * 32 * 2 * 8 * 128 * 2
