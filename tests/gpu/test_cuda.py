"""The engine on a CUDA device against itself on the processor. Skipped, saying so, where there is none."""

from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from pictures import noise

from e5v_search.backbones import Embedder
from e5v_search.backbones.config import TextConfig
from e5v_search.backbones.recorded import LENGTHS
from e5v_search.backbones.upload import Streams, carries, link
from e5v_search.backbones.varlen import agreement, flash

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)

SIZES = [(56, 56), (100, 100), (333, 500), (500, 333), (1, 1), (1, 5000), (120, 40)]
PICTURES = [noise(h, w) for h, w in SIZES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(replica.build(tmp_path_factory.mktemp("replica"))[0])


@pytest.fixture(scope="module")
def truth(folder: str) -> np.ndarray:
    embedder = Embedder.load(folder, device="cpu", dtype="float32")
    return np.concatenate((embedder.embed_images(PICTURES), embedder.embed_texts(replica.SENTENCES)))


@pytest.mark.parametrize(("options", "cosine"), [
    ({"dtype": "float32"}, 0.9999),
    ({"dtype": "float16"}, 0.999),
    ({"dtype": "bfloat16"}, 0.99),
    ({"dtype": "bfloat16", "quantize": "fp8"}, 0.97),
    ({"dtype": "bfloat16", "quantize": "8bit"}, 0.95),
    ({"dtype": "bfloat16", "quantize": "4bit"}, 0.8),
])  # fmt: skip
def test_equals_the_processor(folder: str, truth: np.ndarray, options: dict[str, str], cosine: float) -> None:
    embedder = Embedder.load(folder, device="cuda", **options)  # type: ignore[arg-type]
    x = np.concatenate((embedder.embed_images(PICTURES), embedder.embed_texts(replica.SENTENCES)))
    assert (x * truth).sum(axis=1).min() > cosine


def test_a_remembered_picture_equals_the_processor(folder: str) -> None:
    pairs = [(picture, change) for picture in PICTURES for change in ("make it red", "two dogs, at night, in the snow")]
    expected = Embedder.load(folder, device="cpu", dtype="float32").embed_composed(pairs)
    embedder = Embedder.load(folder, device="cuda", dtype="float32")
    for _ in range(2):
        assert (embedder.embed_composed(pairs) * expected).sum(axis=1).min() > 0.9999
    prepared = [embedder.prepare(picture) for picture in PICTURES]
    one, several = embedder.embed_prepared(prepared, "cirr"), embedder.embed_views(prepared, ["retrieval", "cirr"])
    assert (one * several[1]).sum(axis=1).min() > 0.9999


@pytest.mark.skipif(not AMPERE, reason="needs a GPU from Ampere on")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_rows_equal_padded_ones(folder: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Embedder.load(folder, device="cuda", dtype=dtype)
    assert packed.model.kernel is flash
    assert packed.batches.packed
    with monkeypatch.context() as m:
        m.setattr("e5v_search.backbones.llava_next.kernel_for", lambda *where: None)
        padded = Embedder.load(folder, device="cuda", dtype=dtype)
    assert padded.model.kernel is None
    texts = [*replica.SENTENCES, "a", "word " * 150, *(f"{n} dogs" for n in range(40))]
    pairs = [(picture, change) for picture in PICTURES for change in ("make it red", "two dogs, at night, in the snow")]
    for kind, inputs in (
        ("texts", texts[:1]),
        ("texts", texts),
        ("images", PICTURES),
        ("composed", pairs),
        ("composed", pairs),
    ):
        a, b = (getattr(embedder, f"embed_{kind}")(inputs) for embedder in (packed, padded))
        assert (a * b).sum(axis=1).min() > (0.999 if dtype == "float16" else 0.99)


@pytest.mark.skipif(not AMPERE, reason="needs a GPU from Ampere on")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(32, 8, 128), (4, 4, 64), (4, 2, 16), (8, 1, 256), (4, 4, 40)])
def test_the_kernel_attends_by_the_formula(dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> None:
    c = TextConfig("llama", 50, heads * head_dim, 96, 2, heads, key_heads, head_dim=head_dim)
    assert agreement(flash, c, torch.device("cuda"), dtype) > 0.9999


def test_memory_does_not_grow(folder: str) -> None:
    embedder = Embedder.load(folder, device="cuda")
    embedder.embed_images(PICTURES)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        embedder.embed_images(PICTURES)
    assert torch.cuda.memory_allocated() == before


def test_a_device_that_is_full_halves_the_batch(folder: str, tmp_path: Path) -> None:
    embedder = Embedder.load(folder, device="cuda", dtype="float32")
    expected = embedder.embed_texts(["word " * 150] * 64)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(free - 24 * 2**20, 0), dtype=torch.uint8, device="cuda")
    try:
        x = embedder.embed_texts(["word " * 150] * 64)
    finally:
        del ballast
    assert (x * expected).sum(axis=1).min() > 0.9999


def test_pixels_and_results_travel_while_the_device_computes(caplog: pytest.LogCaptureFixture) -> None:
    cuda = torch.device("cuda")
    made = link(cuda)
    assert type(made) is Streams
    assert not caplog.messages
    busy = torch.ones(4096, 4096, device=cuda)
    for _ in range(20):  # with a queue that is long enough to be overtaken
        for _ in range(20):
            busy = busy @ busy / 4096
        assert carries(made)


def test_many_batches_on_a_link_that_is_busy_equal_the_processor(folder: str, truth: np.ndarray) -> None:
    embedder = Embedder.load(folder, device="cuda", dtype="float32")
    embedder.batches.tokens = 300  # type: ignore[attr-defined]
    for _ in range(5):
        x = np.concatenate((embedder.embed_images(PICTURES), embedder.embed_texts(replica.SENTENCES)))
        assert (x * truth).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize(("dtype", "quantize", "recorded"), [
    ("float32", None, True),
    ("bfloat16", None, True),
    ("bfloat16", "fp8", True),
    ("bfloat16", "8bit", False),
    ("bfloat16", "4bit", False),
])  # fmt: skip
def test_a_recorded_text_equals_one_that_is_not(
    folder: str, dtype: str, quantize: str | None, recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    embedder = Embedder.load(folder, device="cuda", dtype=dtype, quantize=quantize)
    texts = ["a dog", *(f"{n} {'very ' * n}old bridges" for n in range(40))]
    expected = np.concatenate([embedder.embed_texts([text, text + "."])[:1] for text in texts])
    for _ in range(3):
        x = np.concatenate([embedder.embed_texts([text]) for text in texts])
        assert (x * expected).sum(axis=1).min() > (0.9999 if dtype == "float32" else 0.99)
    assert not caplog.messages
    of_one = embedder._recorded  # type: ignore[attr-defined]
    assert (of_one is not None) == recorded
    assert of_one is None or len(of_one._tapes) > len(LENGTHS) // 2


def test_recordings_take_memory_once(folder: str) -> None:
    embedder = Embedder.load(folder, device="cuda", dtype="bfloat16")
    texts = ["very " * n + "old" for n in range(50)]
    for _ in range(2):
        for text in texts:
            embedder.embed_texts([text])
    before = torch.cuda.memory_allocated()
    for text in texts * 3:
        embedder.embed_texts([text])
    assert torch.cuda.memory_allocated() == before
