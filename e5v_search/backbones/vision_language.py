"""What families of vision-language models on transformers' classes share: prompts to ids, batches, the last token's state.

A family says how a picture is prepared and how many tokens it takes (`prepare`), and runs its model (`states`).
Rows shorter than their batch are padded on the right, where nothing real sees the padding.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from e5v_search.backbones import checkpoint, library, registry
from e5v_search.backbones.adapters import Adapter
from e5v_search.backbones.batches import Batches, unit
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.backbones.tiles import Size
from e5v_search.backbones.words import LanguageModel
from e5v_search.config import ModelChoice
from e5v_search.embedder import Fingerprint, Picture
from e5v_search.parallel import ahead
from e5v_search.prompts import WORDINGS


class Prepared(Protocol):
    """A picture as a model takes it; `tokens` is what it costs."""

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """One input: token ids, those of the picture among them, and the picture."""

    ids: list[int]
    picture: Any


class VisionLanguage(LanguageModel):
    CLASS: ClassVar[str]  # of transformers
    WORDING: ClassVar[str]  # where no declaration says another
    IMAGE: ClassVar[str]  # the token that stands for a part of a picture
    ENCODER: ClassVar[type[PromptEncoder]] = PromptEncoder

    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        self.name, self.quantize, self.tiles, self.adapter = choice.name, choice.quantize, "auto", choice.adapter
        self.folder = source.folder
        self.device = checkpoint.pick_device(choice.device)
        numbers = sum(path.stat().st_size for path in checkpoint.shards(source.folder)) / 2
        self.dtype = checkpoint.pick_dtype(choice.dtype, self.device, numbers)
        adapter, adapter_name = source.adapter(choice.adapter) or (None, None)
        self.model = self.load_model(source.folder, choice.quantize, adapter)
        text = self.model.config.get_text_config()
        wording = source.said(WORDINGS[self.WORDING])
        self.encoder = self.ENCODER.read(source.folder, wording, text.max_position_embeddings, self.IMAGE)
        self.dim_of_states: int = text.hidden_size
        cut = source.cut(self.dim_of_states, choice.dim)
        self.dim: int = cut or self.dim_of_states
        self.made_by = Fingerprint(
            source.name, source.revision, weights=choice.quantize or "float", adapter=adapter_name, dim=cut
        )
        self.batches = Batches(self.device, relieve=lambda: 0)

    def load_model(self, folder: Path, quantize: str | None, adapter: Adapter | None) -> Any:
        """The family's model, with an adapter in it."""
        return library.load(folder, self.CLASS, self.device, self.dtype, quantize=quantize, adapter=adapter)

    @abstractmethod
    def prepare(self, image: Image.Image, size: Size | None = None) -> Prepared: ...

    @abstractmethod
    def states(self, ids: Tensor, mask: Tensor, pictures: list[Any]) -> Tensor:
        """The last layer's states (b, t, d) after the final norm, for ids (b, t), of which `mask` (b, t) are real, and the
        prepared pictures in the order in which they stand there."""

    # what goes in

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        """Sentences -> (n, dim). TextTooLong names the first text that does not fit the model's context."""
        return unit(self._embed(Row(ids, None) for ids in self.encoder.ask("text", prompts, texts)))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        """Pictures (paths, encoded bytes or PIL images) -> (n, dim), read ahead in threads. MediaError names the picture."""
        [ids] = self.encoder.ask("image", prompts)
        return unit(self._embed(self._row(ids, picture) for picture in ahead(self.open, images)))

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        """Pictures, each with the change to it -> (n, dim)"""
        asked = self.encoder.ask("composed", prompts, [text for _, text in pairs])
        pictures = ahead(self.open, [picture for picture, _ in pairs])
        x = self._embed(self._row(ids, picture) for ids, picture in zip(asked, pictures, strict=True))
        return unit(x) if normalise else x

    def embed_prepared(self, prepared: Sequence[Prepared], prompts: str = "retrieval") -> np.ndarray:
        [ids] = self.encoder.ask("image", prompts)
        return unit(self._embed(self._row(ids, picture) for picture in prepared))

    def embed_views(self, prepared: Sequence[Prepared], views: Sequence[str]) -> np.ndarray:
        return np.stack([self.embed_prepared(prepared, view) for view in views])

    # how it goes through

    def _row(self, ids: list[int], picture: Prepared) -> Row:
        head, tail = self.encoder.around_image(ids)
        return Row([*head, *[self.encoder.image_id] * picture.tokens, *tail], picture)

    def _embed(self, rows: Iterable[Row]) -> np.ndarray:
        fitting = (row for i, row in enumerate(rows) if self.fitting(len(row.ids), i))
        return self.batches.embed(fitting, lambda row: len(row.ids), self._forward, self.dim)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Row]) -> np.ndarray:
        ids = pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True).to(self.device)
        last = torch.tensor([len(row.ids) - 1 for row in batch], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) <= last[:, None]
        states = self.states(ids, mask, [row.picture for row in batch if row.picture is not None])
        out: np.ndarray = states[torch.arange(len(batch)), last, : self.dim].float().cpu().numpy()
        return out
