"""Eight bits against floats: each kind of layer against its formula, the engine against itself in float32."""

from pathlib import Path

import numpy as np
import pytest
import replica
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from e5v_search import Embedder
from e5v_search.backbones.checkpoint import PACKED
from e5v_search.backbones.fp8 import Fp8Linear
from e5v_search.backbones.int8 import Int8Linear
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.packed import PackedLinear, swap_linears
from e5v_search.errors import ModelError

pytestmark = pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no x86 processor")
SAMPLES = Path(__file__).parent.parent / "e5v_search/samples"
PHOTOS = [SAMPLES / f"{name}.jpg" for name in ("cat", "coffee", "staircase")]


KINDS = pytest.mark.parametrize("kind", PACKED)


def layer(kind: str, k: int, n: int, bias: bool, seed: int = 0) -> tuple[torch.nn.Linear, PackedLinear]:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(k, n, bias=bias)
    packed = PACKED[kind](linear)
    packed.pack(linear.weight.detach())
    return linear, packed


def formula(kind: str, x: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
    """int8: weights in 127 steps to each output's largest, inputs in 63 to each row's largest, whole numbers multiplied.
    fp8: both brought to at most 448, each number rounded to the nearest of e4m3."""

    def rounded(x: torch.Tensor, steps: int) -> torch.Tensor:
        largest = x.double().abs().amax(1, keepdim=True).clamp_min(1e-12)
        if kind == "int8":
            return (x / largest * steps).round() * largest / steps
        return (x / largest * 448).float().to(torch.float8_e4m3fn).double() * largest / 448

    y = rounded(x, 63) @ rounded(linear.weight.double(), 127).T
    return y if linear.bias is None else y + linear.bias


@given(
    kind=st.sampled_from(list(PACKED)),
    m=st.integers(1, 40),
    k=st.sampled_from([16, 64, 704]),
    n=st.sampled_from([16, 96]),
    bias=st.booleans(),
    scale=st.floats(-6, 6),
)
def test_equals_its_formula(kind: str, m: int, k: int, n: int, bias: bool, scale: float) -> None:
    linear, packed = layer(kind, k, n, bias)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)) * 10**scale
    x[m // 2] = 0
    with torch.inference_mode():
        expected = formula(kind, x, linear)
        # a value in the middle between two steps may fall to either
        error = (packed(x) - expected).abs().amax() / (expected.abs().amax() + 1e-9)
    assert error < 0.02


@KINDS
def test_the_largest_sums_do_not_overflow(kind: str) -> None:
    linear = torch.nn.Linear(512, 16, bias=False)
    torch.nn.init.constant_(linear.weight, 1.0)
    packed = PACKED[kind](linear)
    packed.pack(linear.weight.detach())
    with torch.inference_mode():
        assert packed(torch.full((3, 512), -7.0)).unique().tolist() == pytest.approx([-7.0 * 512])


@KINDS
def test_a_row_does_not_depend_on_the_others_and_keeps_its_precision(kind: str) -> None:
    _, packed = layer(kind, 64, 32, True)
    x = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    with torch.inference_mode():
        assert torch.equal(packed(x)[1], packed(x[1]))
        assert packed(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module", params=PACKED)
def both(request: pytest.FixtureRequest) -> tuple[LlavaNextEmbedder, LlavaNextEmbedder]:
    exact, ours = (Embedder.load("e5v-tiny", device="cpu", dtype="float32", quantize=q) for q in (None, request.param))
    assert isinstance(exact, LlavaNextEmbedder)
    assert isinstance(ours, LlavaNextEmbedder)
    return exact, ours


def test_vectors_stay_near_and_are_a_class_of_their_own(both: tuple[LlavaNextEmbedder, LlavaNextEmbedder]) -> None:
    exact, ours = both
    texts = ["a dog runs on the grass", "two children in the snow", "a red cup of coffee on a table"]
    pairs = [(photo, "make it red") for photo in PHOTOS]
    for x, y in (
        (exact.embed_texts(texts), ours.embed_texts(texts)),
        (exact.embed_images(PHOTOS), ours.embed_images(PHOTOS)),
        (exact.embed_composed(pairs), ours.embed_composed(pairs)),
    ):
        assert 0.99 < (x * y).sum(1).min() < 0.999999
    assert ours.fingerprint == exact.fingerprint.replace("/float", f"/{ours.quantize}")
    alone = np.concatenate([ours.embed_texts([text]) for text in texts])
    assert (alone * ours.embed_texts(texts)).sum(1).min() > 0.99999


def test_all_linear_layers_but_those_of_the_first_text_layer(both: tuple[LlavaNextEmbedder, LlavaNextEmbedder]) -> None:
    model = both[1].model
    left = {path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {path.rpartition(".")[0] for path in left} == {
        "language_model.layers.0.self_attn",
        "language_model.layers.0.mlp",
    }
    assert not [name for name, _ in model.named_parameters() if name.endswith(("fc1.weight", "layers.1.mlp.up_proj.weight"))]


@KINDS
def test_published_layout(kind: str, tmp_path: Path) -> None:
    published, _ = replica.build(tmp_path)
    picture = [Image.new("RGB", (90, 60), (200, 30, 30))]
    exact, ours = (Embedder.load(str(published), device="cpu", dtype="float32", quantize=q) for q in (None, kind))
    assert (exact.embed_images(picture) * ours.embed_images(picture)).sum() > 0.98


def test_devices_that_cannot_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="int8 is for x86 processors, not for cuda: leave --quantize out"):
        swap_linears(torch.nn.Sequential(), Int8Linear, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ModelError, match=r"fp8 is for GPUs from Hopper on .* not for cuda"):
        swap_linears(torch.nn.Sequential(), Fp8Linear, torch.device("cuda"))


def test_fp8_leaves_what_its_instructions_cannot_multiply() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 24))
    swap_linears(model, Fp8Linear, torch.device("cpu"))
    assert [type(module) for module in model] == [Fp8Linear, torch.nn.Linear]
