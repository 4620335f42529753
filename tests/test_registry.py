from pathlib import Path

import pytest

from e5v_search.backbones.checkpoint import canonical
from e5v_search.backbones.known import known_models
from e5v_search.backbones.registry import E5V, TINY, choose

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "model", "quantize"),
    [
        (None, TINY, None),
        (4 * GIB, TINY, None),
        (8 * GIB, E5V, "4bit"),
        (19.9 * GIB, E5V, "4bit"),
        (20 * GIB, E5V, None),
        (139 * GIB, E5V, None),
    ],
)
def test_auto_by_free_gpu_memory(free: float | None, model: str, quantize: str | None) -> None:
    chosen, how, line = choose(None if free is None else int(free))
    assert (chosen, how) == (model, quantize)
    assert model in line
    assert "\n" not in line


def test_the_published_model_is_pinned_to_a_whole_commit() -> None:
    revision = known_models()[E5V].revision
    assert revision is not None
    assert len(revision) == 40


@pytest.mark.parametrize(
    "published",
    [
        "language_model.model.layers.3.self_attn.q_proj.weight",  # transformers 4.41
        "model.language_model.layers.3.self_attn.q_proj.weight",  # transformers 5, whole model
        "language_model.layers.3.self_attn.q_proj.weight",  # transformers 5, base model
    ],
)
def test_tensor_names_of_every_layout(published: str) -> None:
    assert canonical(published) == "language_model.layers.3.self_attn.q_proj.weight"


def test_vision_names() -> None:
    for name in ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"):
        assert canonical(name) == "vision_tower.pre_layrnorm.bias"


def test_bundled_model_is_whole() -> None:
    from e5v_search.backbones.registry import resolve

    source = resolve(TINY)
    assert source.name == TINY
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= {
        p.name for p in Path(source.folder).iterdir()
    }
    assert (source.folder / "model.safetensors").stat().st_size <= 40e6
