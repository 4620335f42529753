"""The checkpoint in the package: its size, its words, and that it is what transformers opens too."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.registry import BUNDLED
from e5v_search.prompts import LLAMA3_CHAT, PROMPT_SETS
from e5v_search.training.measure import scene_recalls
from e5v_search.training.tokenizer import PAD

FOLDER = BUNDLED / "e5v-tiny"


@pytest.fixture(scope="module")
def tiny() -> LlavaNextEmbedder:
    return LlavaNextEmbedder.load("e5v-tiny", device="cpu")


def test_it_is_small_and_float16() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 40_000_000
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        keys = list(file.keys())
        assert {file.get_tensor(key).dtype for key in keys} == {torch.float16}
        assert all(torch.isfinite(file.get_tensor(key)).all() for key in keys)
    assert not any(key.startswith("lm_head") for key in keys)


def test_its_card_says_what_a_user_must_know() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"@\w+@", card)
    for word in ("non-commercial", "CC BY-SA", "test split", "training/e5v-tiny.toml", "## Limits"):
        assert word in card


def test_it_finds_scenes_by_caption_and_by_change(tiny: LlavaNextEmbedder) -> None:
    found = scene_recalls(tiny, 40)
    # by chance 1 in 40 and 1 in 79
    assert found["scene_t2i_r1"] >= 0.5
    assert found["scene_composed_r1"] >= 0.25


def test_transformers_opens_it_and_gives_the_same_embedding(tiny: LlavaNextEmbedder) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(FOLDER)
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).model
    assert processor.tokenizer.pad_token == PAD
    for size in ((224, 224), (149, 224), (300, 100)):
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        text = LLAMA3_CHAT.format(PROMPT_SETS["retrieval"].image)
        with torch.inference_mode():
            state = model(**processor(text=text, images=image, return_tensors="pt")).last_hidden_state[0, -1]
        theirs = torch.nn.functional.normalize(state, dim=0).numpy()
        assert float(theirs @ tiny.embed_images([image])[0]) >= 0.99999
