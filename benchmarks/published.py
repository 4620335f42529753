"""Embedding as the published code does it, on today's transformers: what ours is measured against.

The whole model with its output layer, the hidden states of all layers kept, a cache of keys and values made; pictures
prepared by transformers' own PIL processor in the thread that also runs the model; batches padded on the left.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.utils import logging

from e5v_search.prompts import LLAMA3_CHAT, PROMPT_SETS, SENTENCE

PROMPTS = PROMPT_SETS["retrieval"]


class Published:
    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()
        self.processor = LlavaNextProcessor.from_pretrained(folder, backend="pil")
        self.processor.tokenizer.padding_side = "left"

    def embed_texts(self, texts: Sequence[str], batch: int) -> np.ndarray:
        prompts = [LLAMA3_CHAT.replace("{}", PROMPTS.get("text").replace(SENTENCE, text)) for text in texts]
        return np.concatenate([self._embed(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])

    def embed_images(self, paths: Sequence[Path], batch: int) -> np.ndarray:
        prompt = LLAMA3_CHAT.replace("{}", PROMPTS.get("image"))
        found = []
        for i in range(0, len(paths), batch):
            images = [Image.open(path).convert("RGB") for path in paths[i : i + batch]]
            found.append(self._embed([prompt] * len(images), images))
        return np.concatenate(found)

    @torch.no_grad()
    def _embed(self, prompts: list[str], images: list[Image.Image] | None = None) -> np.ndarray:
        inputs = self.processor(text=prompts, images=images, return_tensors="pt", padding=True).to(self.model.device)
        if images is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        hidden = self.model(**inputs, output_hidden_states=True, return_dict=True).hidden_states[-1][:, -1, :]
        x: np.ndarray = torch.nn.functional.normalize(hidden, dim=-1).float().cpu().numpy()
        return x
