"""E5-V: LLaVA-NeXT prompted to say its input in one word (arXiv 2407.12580, section 3).

An embedding is the last layer's hidden state after the final norm at the last position of the prompt, L2-normalised.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from e5v_search import media
from e5v_search.backbones import Embedder, checkpoint, registry
from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.tiles import Tiles, TileSpec, cut, token_count
from e5v_search.embedder import Fingerprint, Picture
from e5v_search.errors import IncompleteCheckpoint, ModelError, OutOfMemory, TextTooLong
from e5v_search.parallel import ahead, windows
from e5v_search.prompts import IMAGE, LLAMA3_CHAT, MISTRAL_CHAT, SENTENCE, load_prompts

# preprocessing of CLIP ViT-L/14-336 as in llava-v1.6: what the published checkpoint means without saying it
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_WINDOW = 256  # inputs sorted by length at a time; bounds memory, costs next to no padding
_BATCH_TOKENS = {"cuda": 32768, "mps": 8192, "cpu": 4096}


@dataclass(frozen=True)
class Row:
    """One input: token ids with at most one image id, and the picture that stands there."""

    ids: list[int]
    tiles: Tiles | None
    length: int  # tokens after the picture is put in


class PromptEncoder:
    """Prompt strings to token ids: the chat wrapper, the one image token, and text that cannot escape its place."""

    def __init__(self, folder: Path, config: LlavaNextConfig) -> None:
        self.tokenizer = _load_tokenizer(folder)
        self.chat = LLAMA3_CHAT if config.text_config.model_type == "llama" else MISTRAL_CHAT
        self.tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])  # no change where it is
        self.image_id = self._id(IMAGE)
        self.max_tokens = config.text_config.max_tokens
        specials = sorted((t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(specials))))
        self._bos = self._leading_bos(folder)

    def _leading_bos(self, folder: Path) -> list[int]:
        # LLaMA-3's tokenizer.json adds the first token itself; some Mistral files leave it to the library
        path = folder / "tokenizer_config.json"
        settings = checkpoint.read_json(path) if path.exists() else {}
        bos = settings.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        if not settings.get("add_bos_token") or bos is None:
            return []
        bos_id = self._id(bos)
        return [] if self.tokenizer.encode("a").ids[:1] == [bos_id] else [bos_id]

    def _id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise IncompleteCheckpoint(f"the tokenizer does not know {token!r}; download the model again")
        return token_id

    def encode(self, prompt: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of `prompt` in the chat wrapper, once for each text.

        Special tokens that a user writes ("<image>", "<|eot_id|>") are broken by a blank and read as plain text.
        """
        wrapped = self.chat.replace("{}", prompt)
        safe = [self._special.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) for text in texts]
        filled = [wrapped.replace(SENTENCE, text) for text in safe]
        return [self._bos + encoding.ids for encoding in self.tokenizer.encode_batch(filled)]


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise IncompleteCheckpoint(f"{path} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not (folder / "tokenizer.model").exists():
        raise IncompleteCheckpoint(f"{folder} has no tokenizer.json: not a whole model folder")
    from transformers import AutoTokenizer  # slow to import, so only for folders with a sentencepiece file alone

    converted: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return converted


def _preprocessing(folder: Path, config: LlavaNextConfig) -> tuple[TileSpec, Tensor, Tensor]:
    """Tile geometry, mean and std (3, 1, 1). Without a processor file: the values the checkpoint was trained with."""
    path = folder / "preprocessor_config.json"
    settings: dict[str, Any] = checkpoint.read_json(path) if path.exists() else {}
    if not settings and (folder / "processor_config.json").exists():
        settings = checkpoint.read_json(folder / "processor_config.json").get("image_processor") or {}
    pinpoints = settings.get("image_grid_pinpoints") or config.image_grid_pinpoints
    vision = config.vision_config
    spec = TileSpec(
        vision.image_size,
        vision.patch_size,
        tuple((int(h), int(w)) for h, w in pinpoints),
        Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)),
    )
    if any(h % spec.tile or w % spec.tile for h, w in spec.pinpoints):
        raise ModelError(f"{folder}: image_grid_pinpoints {spec.pinpoints} are not multiples of the tile, {spec.tile} px")
    mean, std = (
        torch.tensor(settings.get(k) or d).view(3, 1, 1) for k, d in (("image_mean", _CLIP_MEAN), ("image_std", _CLIP_STD))
    )
    return spec, mean, std


class LlavaNextEmbedder(Embedder):
    def __init__(self, source: registry.Source, name: str, device: str, dtype: str, quantize: str | None) -> None:
        raw = checkpoint.read_json(source.folder / "config.json")
        if raw.get("model_type") != "llava_next":
            raise ModelError(
                f"{source.folder} holds a {raw.get('model_type', 'nameless')!r} model; supported: llava_next (E5-V, LLaVA-1.6)"
            )
        config = LlavaNextConfig.from_json(raw)
        self.name, self.quantize = name, quantize
        self.device = checkpoint.pick_device(device)
        self.dtype = checkpoint.pick_dtype(dtype, self.device, config)
        self.encoder = PromptEncoder(source.folder, config)
        self.spec, self._mean, self._std = _preprocessing(source.folder, config)
        self.model: LlavaNext = checkpoint.load_model(source.folder, config, self.device, self.dtype, quantize)
        self.dim = config.text_config.hidden_size
        self.made_by = Fingerprint(source.name, source.revision, weights=quantize or "float")
        self.batch_tokens = _BATCH_TOKENS[self.device.type]

    @classmethod
    def load(
        cls, model: str = "auto", *, device: str = "auto", dtype: str = "auto", quantize: str | None = None
    ) -> "LlavaNextEmbedder":
        if model == "auto":
            free = checkpoint.free_cuda_bytes() if device in ("auto", "cuda") else None
            model, chosen, line = registry.choose(free)
            quantize = quantize or chosen
            print(line, file=sys.stderr)
        return cls(registry.resolve(model), model, device, dtype, quantize)

    # what goes in

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        """Sentences -> (n, dim). TextTooLong names the first text that does not fit the model's context."""
        ids = self.encoder.encode(load_prompts(prompts).get("text"), texts)
        return self._embed_all(Row(row, None, self._fits(len(row), i)) for i, row in enumerate(ids))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        """Pictures (paths, encoded bytes or PIL images) -> (n, dim), read ahead in threads. MediaError names the picture."""
        [ids] = self.encoder.encode(load_prompts(prompts).get("image"), [""])
        return self._embed_all(self._image_row(ids, tiles, i) for i, tiles in enumerate(ahead(self._open, images)))

    def embed_composed(self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr") -> np.ndarray:
        """Pictures, each with the change to it -> (n, dim)."""
        ids = self.encoder.encode(load_prompts(prompts).get("composed"), [text for _, text in pairs])
        pictures = ahead(self._open, (picture for picture, _ in pairs))
        return self._embed_all(self._image_row(row, tiles, i) for i, (row, tiles) in enumerate(zip(ids, pictures, strict=True)))

    def prepare(self, image: Image.Image) -> Tiles:
        """An upright RGB picture -> tiles. Called from many threads, ahead of the model."""
        return cut(image, self.spec)

    def embed_prepared(self, prepared: Sequence[Tiles], prompts: str = "retrieval") -> np.ndarray:
        [ids] = self.encoder.encode(load_prompts(prompts).get("image"), [""])
        return self._embed_all(self._image_row(ids, tiles, i) for i, tiles in enumerate(prepared))

    def _open(self, picture: Picture) -> Tiles:
        return self.prepare(media.open_picture(picture))

    def _image_row(self, ids: list[int], tiles: Tiles, index: int) -> Row:
        return Row(ids, tiles, self._fits(len(ids) - 1 + token_count(tiles.size, self.spec), index))

    def _fits(self, length: int, index: int) -> int:
        if length > self.encoder.max_tokens:
            raise TextTooLong(
                f"input {index + 1} has {length} tokens with its prompt; "
                f"{self.name} takes {self.encoder.max_tokens} at most: shorten it"
            )
        return length

    # what comes out

    def _embed_all(self, rows: Iterable[Row]) -> np.ndarray:
        blocks = [self._embed_window(window) for window in windows(rows, _WINDOW)]
        return np.concatenate(blocks) if blocks else np.empty((0, self.dim), np.float32)

    def _embed_window(self, window: list[Row]) -> np.ndarray:
        order = sorted(range(len(window)), key=lambda i: window[i].length, reverse=True)
        out = np.empty((len(window), self.dim), np.float32)
        while order:
            # rows are sorted, so the first is what the others are padded to
            n = max(1, self.batch_tokens // window[order[0]].length)
            batch, order = order[:n], order[n:]
            out[batch] = self._embed_batch([window[i] for i in batch])
        return out

    def _embed_batch(self, batch: list[Row]) -> np.ndarray:
        """One forward pass; halved for as long as the device has too little memory for it."""
        try:
            return self._forward(batch)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            if len(batch) == 1:
                raise OutOfMemory(
                    f"{self.device} has too little memory for one input of {batch[0].length} tokens; "
                    "close other programs on it, or load the model with --quantize 4bit"
                ) from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        half = len(batch) // 2
        return np.concatenate((self._embed_batch(batch[:half]), self._embed_batch(batch[half:])))

    @torch.inference_mode()
    def _forward(self, batch: list[Row]) -> np.ndarray:
        embed = self.model.language_model.embed_tokens
        pictures = iter(self._features([row.tiles for row in batch if row.tiles is not None]))
        inputs = []
        for row in batch:
            ids = torch.tensor(row.ids, device=self.device)
            if row.tiles is None:
                inputs.append(embed(ids))
            else:
                # the image id is never looked up: in one published revision it lies outside the table
                at = row.ids.index(self.encoder.image_id)
                inputs.append(torch.cat((embed(ids[:at]), next(pictures), embed(ids[at + 1 :]))))
        hidden = self.model.last_hidden(inputs).float()
        out: np.ndarray = torch.nn.functional.normalize(hidden, dim=-1).cpu().numpy()
        return out

    def _features(self, pictures: list[Tiles]) -> list[Tensor]:
        if not pictures:
            return []
        pixels = torch.from_numpy(np.concatenate([p.pixels for p in pictures])).to(self.device)
        mean, std = self._mean.to(self.device), self._std.to(self.device)
        normalised = ((pixels.float() * (1 / 255) - mean) / std).to(self.dtype)
        return self.model.image_features(normalised, [p.size for p in pictures], [p.grid for p in pictures])
