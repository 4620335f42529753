"""A batch of texts or pictures through the real prompts, with gradients: what the engine does for one input at a time.

Rows have no padding to the left and attention is causal, so no mask is needed anywhere (see Padded).
"""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e5v_search.backbones.batches import Batches
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import PromptEncoder
from e5v_search.backbones.tiles import Tiles
from e5v_search.prompts import load_prompts
from e5v_search.training.export import MEAN, STD
from e5v_search.training.packed import last_states, pack
from e5v_search.training.tokenizer import BOS, EOS, PAD

R = TypeVar("R", bound=Sized)


class BatchEncoder:
    """Of a sentence, `max_text` tokens are kept. Rows of similar length go through the decoder together, `batches.tokens`
    at a time, padding included."""

    def __init__(self, model: LlavaNext, prompts: PromptEncoder, max_text: int = 40) -> None:
        self.model, self.prompts, self.max_text = model, prompts, max_text
        self.tokenizer = prompts.tokenizer
        self.device = model.language_model.embed_tokens.weight.device
        self.batches = Batches(self.device, lambda: 0)
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, STD))

    def texts(self, sentences: Sequence[str], prompts: str = "retrieval") -> Tensor:
        """(n, d)"""
        return self.read(self.ids(load_prompts(prompts).get("text"), sentences))

    def pictures(self, features: Tensor | Sequence[Tensor], prompts: str = "retrieval") -> Tensor:
        """Visual tokens (one (n, p, d) or n of (p_i, d)) inside the image prompt -> (n, d)"""
        [ids] = self.ids(load_prompts(prompts).get("image"), [""])
        return self.last(self.rows([ids] * len(features), features))

    def composed(self, features: Tensor | Sequence[Tensor], changes: Sequence[str], prompts: str = "cirr") -> Tensor:
        """Visual tokens with a change each -> (n, d)"""
        return self.last(self.rows(self.ids(load_prompts(prompts).get("composed"), changes), features))

    def bare_tokens(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Language modelling of bare sentences: the states (m, d) before each token and those tokens (m,). The last token
        of each says that the text ends.
        """
        begin = self.rows([[self.prompts.id(BOS)]] * len(sentences), [None] * len(sentences))
        return self._before_tokens(begin, sentences, EOS)

    def caption_tokens(self, features: Tensor | Sequence[Tensor], captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pictures asked for a summary, and their captions as answers: as `bare_tokens`, of the answers."""
        [ids] = self.ids(load_prompts("prompt").get("image"), [""])
        rows = self.rows([ids] * len(features), features)
        return self._before_tokens(rows, [f" {caption}" for caption in captions], PAD)

    def paraphrase_tokens(self, sentences: Sequence[str], others: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Sentences asked for a summary, and others that say the same as answers: as `bare_tokens`, of the answers."""
        rows = self.rows(self.ids(load_prompts("prompt").get("text"), sentences), [None] * len(sentences))
        return self._before_tokens(rows, [f" {other}" for other in others], PAD)

    def base_features(
        self,
        pixels: Tensor,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
        plain: bool = False,
        colour: float = 0.0,
    ) -> Tensor:
        """Visual tokens of base tiles alone, (n, p, d); see `base_patches`."""
        patches, _ = self.base_patches(pixels, drop, generator, plain, colour)
        features: Tensor = self.model.multi_modal_projector(patches)
        return features

    def base_patches(
        self,
        pixels: Tensor,
        drop: float = 0.0,
        generator: torch.Generator | None = None,
        plain: bool = False,
        colour: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The vision tower on base tiles: (n, 3, tile, tile) uint8 -> (n, p, d_vision), and which patches these are, (n, p).

        A share `drop` of the patches never enters: any, or with `plain` those that show least. Brightness, contrast and
        saturation of each picture stray by a share of up to `colour`.
        """
        tower = self.model.vision_tower
        pixels = self.normalised(pixels)
        x = tower.embeddings(_strayed(pixels, colour, generator) if colour else pixels)
        n, tokens, d = x.shape
        if drop:
            keep = round((tokens - 1) * (1 - drop))
            order = torch.rand(n, tokens - 1, generator=generator, device=x.device)
            if plain:
                size = self.model.config.vision_config.patch_size
                # chance decides between equal ones
                order = 1e-3 * order - F.unfold(pixels, size, stride=size).var(dim=1)
            places = order.argsort(dim=1)[:, :keep].sort(dim=1).values
            chosen = torch.cat((torch.zeros_like(places[:, :1]), places + 1), dim=1)
            x = x.gather(1, chosen[..., None].expand(-1, -1, d))
        else:
            places = torch.arange(tokens - 1, device=x.device).expand(n, -1)
        x = tower.pre_layrnorm(x)
        for layer in tower.encoder.layers:
            x = layer(x)
        return x[:, self.model.config.skip_class_token :], places

    def full_features(self, pictures: Sequence[Tiles]) -> list[Tensor]:
        """Visual tokens in the AnyRes layout, (n_i, d) for each picture. Gradients are as the tower's parameters ask."""
        pixels = torch.from_numpy(np.concatenate([p.pixels for p in pictures]))
        return self.model.image_features(self.normalised(pixels), [p.size for p in pictures], [p.grid for p in pictures])

    def normalised(self, pixels: Tensor) -> Tensor:
        dtype = self.model.vision_tower.embeddings.patch_embedding.weight.dtype
        return ((pixels.to(self.device).float() / 255 - self.mean) / self.std).to(dtype)

    def prompt_tokens(self) -> list[int]:
        """All tokens that the trained prompts consist of."""
        prompts = [load_prompts(name) for name in ("retrieval", "cirr", "sts")]
        kinds = [(p, kind) for p in prompts for kind in ("text", "image", "composed") if getattr(p, kind)]
        return sorted({token for p, kind in kinds for row in self.ids(p.get(kind), [""]) for token in row})

    def ids(self, prompt: str, sentences: Sequence[str]) -> list[list[int]]:
        return self.prompts.encode(prompt, self.shortened(sentences, self.max_text))

    def shortened(self, sentences: Sequence[str], tokens: int) -> list[str]:
        """Each sentence to the end of its first `tokens` tokens."""
        return [self._cut(sentence, tokens) for sentence in sentences]

    def _cut(self, sentence: str, tokens: int) -> str:
        if len(sentence.encode()) <= tokens:  # no token is shorter than a byte
            return sentence
        encoded = self.tokenizer.encode(sentence, add_special_tokens=False)
        return sentence[: encoded.offsets[tokens - 1][1]] if len(encoded) > tokens else sentence

    def rows(self, ids: Sequence[list[int]], visual: Iterable[Tensor | None]) -> list[Tensor]:
        """Input embeddings (t_i, d) of each row: its ids, in the place of the image id its visual tokens."""
        both = list(zip(ids, visual, strict=True))
        # the image id itself is never looked up: it may lie outside the table
        parts = [part for row, v in both for part in ([row] if v is None else self.prompts.around_image(row))]
        # one look-up for all rows: each look-up's gradient is as large as the whole table
        flat = torch.tensor([token for part in parts for token in part], device=self.device)
        words = iter(self.model.language_model.embed_tokens(flat).split([len(part) for part in parts]))
        return [next(words) if v is None else torch.cat((next(words), v, next(words))) for _, v in both]

    def read(self, ids: Sequence[list[int]]) -> Tensor:
        """Texts as token ids -> (n, d). What rows of one batch have in common at their beginning is computed once."""
        return self._in_order(ids, lambda rows: last_states(self.model.language_model, pack(rows, self.device)))

    def last(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of input embeddings (t_i, d) -> (n, d)"""
        return self._in_order(rows, self.model.last_hidden)

    def _in_order(self, rows: Sequence[R], forward: Callable[[Sequence[R]], Tensor]) -> Tensor:
        chunks = list(self.batches.cut(range(len(rows)), lambda i: len(rows[i])))
        hidden = torch.cat([forward([rows[i] for i in chunk]) for chunk in chunks])
        back = torch.tensor([i for chunk in chunks for i in chunk], device=hidden.device).argsort()
        return hidden[back]

    def _before_tokens(self, rows: Sequence[Tensor], answers: Sequence[str], end: str) -> tuple[Tensor, Tensor]:
        """Rows (t_i, d) of input embeddings, each gone on with by its answer and `end`."""
        texts = self.shortened(answers, self.max_text)
        ids = [[*e.ids, self.prompts.id(end)] for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        # the last token is only foretold
        words = self.rows([own[:-1] for own in ids], [None] * len(ids))
        inputs = [torch.cat((row, own)) for row, own in zip(rows, words, strict=True)]
        hidden, tokens = [], []
        for chunk in self.batches.cut(range(len(inputs)), lambda i: len(inputs[i])):
            states = self.model.language_model.states(nn.utils.rnn.pad_sequence([inputs[i] for i in chunk], batch_first=True))
            hidden += [states[k, len(rows[i]) - 1 : len(inputs[i])] for k, i in enumerate(chunk)]
            tokens += [token for i in chunk for token in ids[i]]
        return torch.cat(hidden), torch.tensor(tokens, device=self.device)


def _strayed(pixels: Tensor, colour: float, generator: torch.Generator | None) -> Tensor:
    """Pictures (n, 3, height, width), each with a brightness, contrast and saturation of its own."""

    def factor() -> Tensor:
        return 1 + colour * (2 * torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device) - 1)

    grey = pixels.mean(dim=1, keepdim=True)
    pixels = grey + factor() * (pixels - grey)
    middle = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return middle + factor() * (pixels - middle) + factor() - 1
