"""CLIP and SigLIP: a tower for pictures and one for texts, in one space. What E5-V is compared with.

The towers are transformers' own; what goes into them is made here, the same pixels and ids as its PIL processors make.
There is nothing to prompt: texts go in bare, whatever the prompt set, and a composed query is the sum of the embeddings
of its picture and its text. A text beyond the tower's context (77 tokens of CLIP, 64 of SigLIP) is cut there, since that
is how these models are evaluated.
"""

import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from e5v_search.backbones import checkpoint, known, library, registry
from e5v_search.backbones.batches import TEXTS, Batches, unit
from e5v_search.backbones.pixels import Pixels
from e5v_search.backbones.prompt_encoder import load_tokenizer
from e5v_search.backbones.tiles import Size
from e5v_search.backbones.words import Wordless
from e5v_search.config import ModelChoice
from e5v_search.embedder import NO_PROMPTS, Fingerprint, Picture
from e5v_search.errors import IncompleteCheckpoint
from e5v_search.parallel import ahead
from e5v_search.prompts import INSTRUCTED, load_prompts

_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_OF_THE_LOSS = ("logit_scale", "logit_bias")  # temperature and bias of the training


class TwoTowers(Wordless):
    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        raw = checkpoint.read_json(source.folder / "config.json")
        self._family: str = raw["model_type"]
        self.name, self.quantize, self.tiles, self.adapter = choice.name, None, "auto", None
        self.device = checkpoint.pick_device(choice.device)
        self.dtype = checkpoint.pick_dtype(choice.dtype, self.device)
        self.model = library.load(source.folder, _MODELS[self._family], self.device, self.dtype, expendable=_OF_THE_LOSS)
        config = self.model.config
        siglip = self._family == "siglip"
        whole: int = config.text_config.projection_size if siglip else config.projection_dim
        cut = source.cut(whole, choice.dim)
        self.dim = cut or whole
        self.tokens = TextTokens(source.folder, config.text_config.max_position_embeddings, siglip)
        self.pixels = Pixels.read(source.folder, config.vision_config.image_size, square=siglip)
        self.made_by = Fingerprint(source.name, source.revision, prompts=NO_PROMPTS, tiles="none", dim=cut)
        self.batches = Batches(self.device, relieve=lambda: 0)
        self._patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        """Sentences -> (n, dim). Which of our prompt sets does not matter; UsageError for words of the user's own."""
        self._refuse_words(prompts)
        return unit(self.batches.embed(self.tokens(texts), len, self._texts, self.dim, TEXTS))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        """Pictures (paths, encoded bytes or PIL images) -> (n, dim), read ahead in threads. MediaError names the picture."""
        self._refuse_words(prompts)
        return self._embed_pixels(ahead(self.open, images))

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        """Pictures, each with the change to it -> (n, dim): the sum of the two embeddings."""
        pictures, texts = [picture for picture, _ in pairs], [text for _, text in pairs]
        x = self.embed_images(pictures, prompts) + self.embed_texts(texts, prompts)
        return unit(x) if normalise else x

    def enough(self, size: Size) -> Size:
        return self.pixels.enough(size)

    def prepare(self, image: Image.Image, size: Size | None = None) -> np.ndarray:
        """An upright RGB picture -> (3, height, width) uint8, as the tower takes it. Called from many threads."""
        return self.pixels(image)

    def embed_prepared(self, prepared: Sequence[np.ndarray], prompts: str = "retrieval") -> np.ndarray:
        self._refuse_words(prompts)
        return self._embed_pixels(prepared)

    def embed_views(self, prepared: Sequence[np.ndarray], views: Sequence[str]) -> np.ndarray:
        """-> (len(views), n, dim), the same in every view."""
        for view in views:
            self._refuse_words(view)
        return np.repeat(self._embed_pixels(prepared)[None], len(views), axis=0)

    def _refuse_words(self, prompts: str) -> None:
        if load_prompts(prompts).of_the_user:
            option = "--instruction" if prompts.startswith(INSTRUCTED) else "--prompts"
            known.check_takes(self._family, "instruction", option, self.name)

    def _embed_pixels(self, prepared: Iterable[np.ndarray]) -> np.ndarray:
        return unit(self.batches.embed(prepared, lambda _: self._patches, self._images, self.dim))

    @torch.inference_mode()
    def _texts(self, batch: Sequence[list[int]]) -> np.ndarray:
        # CLIP reads its first end token and sees nothing behind it; SigLIP's rows are all of one length
        rows = [torch.tensor(ids) for ids in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokens.pad_id)
        return self._pooled(self.model.get_text_features(input_ids=ids.to(self.device)))

    @torch.inference_mode()
    def _images(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        pixels = self.pixels.normalised(torch.from_numpy(np.stack(batch)).to(self.device))
        return self._pooled(self.model.get_image_features(pixel_values=pixels.to(self.dtype)))

    def _pooled(self, features: Any) -> np.ndarray:
        out: np.ndarray = features.pooler_output[:, : self.dim].float().cpu().numpy()
        return out


class TextTokens:
    """Texts -> ids, at most `length` of them. SigLIP was trained on rows padded to that length, which it sees."""

    def __init__(self, folder: Path, length: int, siglip: bool) -> None:
        path = folder / "tokenizer_config.json"
        settings: dict[str, Any] = checkpoint.read_json(path) if path.exists() else {}
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.enable_truncation(length)
        self.siglip = siglip
        # SigLIP's first tokenizer drops punctuation, that of SigLIP 2 keeps it; both models read lower case alone
        self._drop = string.punctuation if str(settings.get("tokenizer_class")).startswith("SiglipTokenizer") else ""
        token = settings.get("pad_token") or settings.get("eos_token") or "<|endoftext|>"
        token = token["content"] if isinstance(token, dict) else token
        pad_id = self.tokenizer.token_to_id(token)
        if pad_id is None:
            raise IncompleteCheckpoint(f"{folder}: the tokenizer does not know its padding token {token!r}")
        self.pad_id: int = pad_id
        if siglip:
            direction = settings.get("padding_side", "right")
            self.tokenizer.enable_padding(direction=direction, pad_id=pad_id, pad_token=token, length=length)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch([self._clean(text) for text in texts])]

    def _clean(self, text: str) -> str:
        if not self.siglip:
            return text  # the tokenizer itself does what CLIP's texts need
        text = text.lower()
        return re.sub(r"\s+", " ", text.translate(str.maketrans("", "", self._drop))).strip() if self._drop else text
