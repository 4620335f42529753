"""E5-V: LLaVA-NeXT prompted to say its input in one word (arXiv 2407.12580, section 3).

An embedding is the last layer's hidden state after the final norm at the last position of the prompt, L2-normalised.
"""

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from e5v_search import media
from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.batches import TEXTS, WINDOW, Batches, unit
from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.layout import Padded
from e5v_search.backbones.modules import LlavaNext, TextDecoder
from e5v_search.backbones.prefix import Beginning, Key, PrefixMemory, default_limit, digest
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.backbones.recorded import Read, Recorded, cuda_graphs
from e5v_search.backbones.tiles import Size, Tiles, TileSpec, cut, enough, token_count
from e5v_search.backbones.upload import indices, link
from e5v_search.backbones.varlen import kernel_for
from e5v_search.backbones.words import LanguageModel
from e5v_search.config import ModelChoice
from e5v_search.embedder import Fingerprint, Picture
from e5v_search.errors import MediaError, ModelError
from e5v_search.parallel import ahead, windows

# preprocessing of CLIP ViT-L/14-336 as in llava-v1.6: what the published checkpoint means without saying it
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_SHARED = 8  # texts from which on a pass over their common beginning is won back


@dataclass(frozen=True)
class Row:
    """One input: token ids with at most one image id, and the picture that stands there."""

    ids: list[int]
    tiles: Tiles | None
    length: int  # tokens after the picture is put in


@dataclass(frozen=True)
class Continued:
    """One input: its beginning, and the ids behind the picture."""

    begin: Beginning
    ids: list[int]


def preprocessing(folder: Path, config: LlavaNextConfig) -> tuple[TileSpec, Tensor, Tensor]:
    """Tile geometry, mean and std (3, 1, 1). Without a processor file: the values the checkpoint was trained with."""
    settings = checkpoint.image_settings(folder)
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


def _identity(picture: Picture) -> object:
    # pictures in memory are told apart by where they are: comparing them would compare their pixels
    return id(picture) if isinstance(picture, Image.Image) else picture


def _content(picture: Picture) -> str | None:
    """Hash of a file or of the bytes of one; None for what is no file or cannot be read, of which opening it will say why."""
    if isinstance(picture, Image.Image):
        return None
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    try:
        return media.content_hash(picture)
    except MediaError:
        return None


def reading(decoder: TextDecoder, dim: int) -> Read:
    """Refers to no embedder, which refers to what is recorded of this: a device's memory is free as soon as one is gone."""
    return lambda ids, n: decoder(decoder.embed_tokens(ids), Padded(n, ids.shape[1]))[:, :dim].float()


class LlavaNextEmbedder(LanguageModel):
    """`memory` keeps what the model saw of pictures for `embed_composed`; set its `limit` (bytes) or clear it at will."""

    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        raw = checkpoint.read_json(source.folder / "config.json")
        config = LlavaNextConfig.from_json(raw)
        text = config.text_config
        self.name, self.quantize, self.adapter, self.folder = choice.name, choice.quantize, choice.adapter, source.folder
        self.device = checkpoint.pick_device(choice.device)
        # what packed layers leave in floats is little: on a processor it may as well be fast
        large = 0 if self.quantize in checkpoint.PACKED else text.parameters
        self.dtype = checkpoint.pick_dtype(choice.dtype, self.device, large)
        self.encoder = PromptEncoder.read(source.folder, source.said(text.wording), text.max_tokens)
        spec, *mean_std = preprocessing(source.folder, config)
        self._mean, self._std = ((255 * values).to(self.device) for values in mean_std)
        self.spec, self.tiles = spec.limited(choice.tiles)
        cut = source.cut(text.hidden_size, choice.dim)
        self.dim = cut or text.hidden_size
        adapter, adapter_name = source.adapter(choice.adapter) or (None, None)
        self.model: LlavaNext = checkpoint.load_model(
            source.folder, config, self.device, self.dtype, self.quantize, adapter=adapter
        )
        self.made_by = Fingerprint(
            source.name,
            source.revision,
            tiles=self.tiles,
            weights=self.quantize or "float",
            adapter=adapter_name,
            dim=cut,
        )
        self.memory = PrefixMemory(default_limit(self.device))
        self.model.kernel = kernel_for(text, self.device, self.dtype)
        self._beginning_alone = threading.Lock()
        self.link = link(self.device)
        self.abreast = self.link.abreast
        packed = self.model.kernel is not None
        self.batches = Batches(self.device, self.memory.clear, packed=packed, abreast=self.abreast)
        self._recorded: Recorded | None = None
        # bitsandbytes' layers look at values as they go, which cannot be recorded
        if self.device.type == "cuda" and self.quantize in (None, *checkpoint.PACKED):
            self._recorded = Recorded(reading(self.model.language_model, self.dim), cuda_graphs(self.device), self.device)

    # what goes in

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        """Sentences -> (n, dim). TextTooLong names the first text that does not fit the model's context."""
        ids = self.encoder.ask("text", prompts, texts)
        return self._embed_plain((Row(row, None, self.fitting(len(row), i)) for i, row in enumerate(ids)), TEXTS)

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        """Pictures (paths, encoded bytes or PIL images) -> (n, dim), read ahead in threads. MediaError names the picture."""
        [ids] = self.encoder.ask("image", prompts)
        return self._embed_plain(self._image_row(ids, tiles, i) for i, tiles in enumerate(ahead(self.open, images)))

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        """Pictures, each with the change to it -> (n, dim).

        What the model saw of a picture is kept in `memory`: further changes to it, in this call or the next, cost their
        text alone. Within a call they need not even be kept when they stand side by side.
        """
        ids = self.encoder.ask("composed", prompts, [text for _, text in pairs])
        parts = [self.encoder.around_image(row) for row in ids]
        wanted = zip((picture for picture, _ in pairs), (tuple(head) for head, _ in parts), strict=True)
        runs = [list(run) for _, run in groupby(wanted, lambda one: (_identity(one[0]), one[1]))]
        begins = ahead(self._begin, (run[0] for run in runs))
        beginnings = (begin for begin, run in zip(begins, runs, strict=True) for _ in run)
        rows = (self._continued(begin, tail, i) for i, (begin, (_, tail)) in enumerate(zip(beginnings, parts, strict=True)))
        x = self._embed_continued(rows, WINDOW, self.memory)
        return unit(x) if normalise else x

    def enough(self, size: Size) -> Size:
        return enough(size, self.spec)

    def prepare(self, image: Image.Image, size: Size | None = None) -> Tiles:
        """An upright RGB picture, or a reduction of one of `size`, -> tiles. Called from many threads, ahead of the model."""
        return cut(image, self.spec, size)

    def embed_prepared(self, prepared: Sequence[Tiles], prompts: str = "retrieval") -> np.ndarray:
        [ids] = self.encoder.ask("image", prompts)
        return self._embed_plain(self._image_row(ids, tiles, i) for i, tiles in enumerate(prepared))

    def embed_views(self, prepared: Sequence[Tiles], views: Sequence[str]) -> np.ndarray:
        """Prepared pictures under the image prompts of several sets, from one pass over each -> (len(views), n, dim)."""
        if len(views) == 1:
            return self.embed_prepared(prepared, views[0])[None]
        prompts = [self.encoder.around_image(self.encoder.ask("image", view)[0]) for view in views]
        rows = (
            self._continued(self._beginning(str(i), tuple(head), tiles), tail, i)
            for i, tiles in enumerate(prepared)
            for head, tail in prompts
        )
        x = unit(self._embed_continued(rows, WINDOW * len(views)))
        return np.ascontiguousarray(x.reshape(len(prepared), len(views), self.dim).transpose(1, 0, 2))

    # how it goes in

    def _image_row(self, ids: list[int], tiles: Tiles, index: int) -> Row:
        return Row(ids, tiles, self.fitting(len(ids) - 1 + token_count(tiles.size, self.spec), index))

    def _begin(self, wanted: tuple[Picture, tuple[int, ...]]) -> Beginning:
        """What a composed input begins with. A file that was seen before is read to see that it is the same, not decoded."""
        picture, head = wanted
        known = self.memory.picture(content) if (content := _content(picture)) else None
        if known is not None and (prefix := self.memory.get(Key(known, head))) is not None:
            return Beginning(Key(known, head), prefix.shape[2], prefix=prefix)
        if isinstance(picture, Image.Image):
            tiles = self.open(picture)
            return self._beginning(digest(tiles), head, tiles)
        photo = media.open_photo(picture, enough=self.enough)
        tiles = self.prepare(photo.image, photo.facts.size)
        seen = digest(tiles)
        self.memory.name_picture(photo.content_hash, seen)
        return self._beginning(seen, head, tiles)

    def _beginning(self, picture: str, head: tuple[int, ...], tiles: Tiles) -> Beginning:
        return Beginning(Key(picture, head), len(head) + token_count(tiles.size, self.spec), tiles)

    def _continued(self, begin: Beginning, tail: list[int], index: int) -> Continued:
        self.fitting(begin.length + len(tail), index)
        return Continued(begin, tail)

    # what comes out

    def _embed_plain(self, rows: Iterable[Row], window: int = WINDOW) -> np.ndarray:
        """Every row by itself, in one pass; normalised."""
        return unit(self.batches.embed(rows, lambda row: row.length, self._forward, self.dim, window))

    def _embed_continued(self, rows: Iterable[Continued], window: int, memory: PrefixMemory | None = None) -> np.ndarray:
        """Rows that go on from pictures, not normalised: in each window one pass over each picture, however often it occurs."""
        vectors = [vector for some in windows(rows, window) for vector in self._go_on_from(some, memory)]
        return np.stack(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def _go_on_from(self, rows: Sequence[Continued], memory: PrefixMemory | None) -> list[np.ndarray]:
        groups: dict[Key, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.begin.key, []).append(i)
        out: dict[int, np.ndarray] = {}
        for some in self.batches.cut(list(groups.values()), lambda group: rows[group[0]].begin.length):
            # prefixes are large: those of one batch of pictures at a time, in however many threads
            with self._beginning_alone:
                out |= self._go_on_in_groups(rows, some, memory)
        return [out[i] for i in range(len(rows))]

    def _go_on_in_groups(
        self, rows: Sequence[Continued], groups: Sequence[list[int]], memory: PrefixMemory | None
    ) -> dict[int, np.ndarray]:
        """By their places in `rows`, the vectors of those in groups that begin alike."""
        prefixes = self._prefixes([rows[group[0]].begin for group in groups], memory)
        work = [(i, prefix) for group, prefix in zip(groups, prefixes, strict=True) for i in group]
        vectors: list[np.ndarray] = self.batches.run(
            work,
            lambda row: rows[row[0]].begin.length + len(rows[row[0]].ids),
            lambda batch: self._go_on([rows[i].ids for i, _ in batch], [prefix for _, prefix in batch]),
        )
        return dict(zip((i for i, _ in work), vectors, strict=True))

    def _prefixes(self, begins: Sequence[Beginning], memory: PrefixMemory | None) -> list[Tensor]:
        """Of beginnings that all differ."""
        known = [begin.prefix if memory is None or begin.prefix is not None else memory.get(begin.key) for begin in begins]
        missing = [begin for begin, prefix in zip(begins, known, strict=True) if prefix is None]
        made = self.batches.run(missing, lambda begin: begin.length, self._prefill)
        if memory is not None:
            for begin, prefix in zip(missing, made, strict=True):
                memory.put(begin.key, prefix)
        rest = iter(made)
        return [next(rest) if prefix is None else prefix for prefix in known]

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Row]) -> np.ndarray:
        return self.link.fetch(lambda: self._states(batch))

    def _states(self, batch: Sequence[Row]) -> Tensor:
        """(b, dim) of rows, each by itself."""
        if len(batch) >= _SHARED and all(row.tiles is None for row in batch):
            return self._from_one_beginning([row.ids for row in batch])
        if self._recorded and len(batch) == 1 and batch[0].tiles is None:
            return self._recorded(batch[0].ids)
        pictures = iter(self._features([row.tiles for row in batch if row.tiles is not None]))
        parts = [(row.ids,) if row.tiles is None else self.encoder.around_image(row.ids) for row in batch]
        words = iter(self._words([ids for part in parts for ids in part]))
        inputs = [next(words) if row.tiles is None else torch.cat((next(words), next(pictures), next(words))) for row in batch]
        return self._floats(self.model.last_hidden(inputs))

    def _from_one_beginning(self, rows: Sequence[list[int]]) -> Tensor:
        """Texts begin alike, with the chat wrapper at least: that much is computed once."""
        first, last = min(rows), max(rows)
        alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        n = min(alike, min(map(len, rows)) - 1)
        prefixes = self.model.prefill(self._words([rows[0][:n]])) if n else None
        return self._floats(self.model.last_hidden(self._words([ids[n:] for ids in rows]), prefixes))

    @torch.inference_mode()
    def _prefill(self, batch: Sequence[Beginning]) -> list[Tensor]:
        with self.link.launching:
            features = self._features([begin.tiles for begin in batch if begin.tiles is not None])
            words = self._words([begin.key.ids for begin in batch])
            return self.model.prefill([torch.cat(parts) for parts in zip(words, features, strict=True)])

    @torch.inference_mode()
    def _go_on(self, tails: Sequence[list[int]], prefixes: Sequence[Tensor]) -> np.ndarray:
        return self.link.fetch(lambda: self._floats(self.model.last_hidden(self._words(tails), prefixes)))

    def _floats(self, hidden: Tensor) -> Tensor:
        return hidden[:, : self.dim].float()

    def _words(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Input embeddings (n_i, d) of rows of ids."""
        ids = indices([i for row in rows for i in row], self.device)
        return list(self.model.language_model.embed_tokens(ids).split([len(row) for row in rows]))

    def _features(self, pictures: list[Tiles]) -> list[Tensor]:
        if not pictures:
            return []
        normalised = self.link.floats([p.pixels for p in pictures]).sub_(self._mean).div_(self._std)
        return self.model.image_features(normalised.to(self.dtype), [p.size for p in pictures], [p.grid for p in pictures])
