"""A pretrained LLaVA-NeXT that learns: all of its weights or an adapter's, from full precision or from 4 bit."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn

from e5v_search.backbones import checkpoint, registry
from e5v_search.backbones.config import LlavaNextConfig
from e5v_search.backbones.llava_next import Row, preprocessing
from e5v_search.backbones.modules import LlavaNext
from e5v_search.backbones.prompt_encoder import PromptEncoder, named, tokenizer_settings
from e5v_search.backbones.tiles import Tiles, TileSpec, cut, token_count
from e5v_search.errors import ModelError, UsageError
from e5v_search.prompts import load_prompts
from e5v_search.training.encode import BatchEncoder
from e5v_search.training.quirks import attended, plain_ids

# Both the names of transformers' modules today and those of 4.41; not lm_head, nor the vision tower, whose names are alike
TARGETS = r".*language_model\..*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

Parts = Literal["language", "all"]


@dataclass(frozen=True)
class Lora:
    """An adapter on every linear layer of the language model but lm_head."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05

    def problems(self) -> list[str]:
        found = [f"{k}: must be positive" for k in ("rank", "alpha") if getattr(self, k) <= 0]
        return found if 0 <= self.dropout < 1 else [*found, "dropout: must lie in [0, 1)"]


@dataclass(frozen=True)
class Quirks:
    """What the published code does to texts (see `quirks`): the prompt's special tokens as plain text; pads attended."""

    plain_template: bool = False
    attend_pads: bool = False

    def __bool__(self) -> bool:
        return self.plain_template or self.attend_pads


class Tuned:
    """`model` holds the weights, `trainable()` those that learn, always in float32.

    Inputs become rows (`text_rows`, `picture_rows`, `composed_rows`), whose `length` says what they cost; `embed` takes
    rows of any kind together -> (n, d) float32, not normalised, with gradients. `texts`, `pictures` and `composed` do both.
    """

    def __init__(
        self,
        source: registry.Source,
        model: LlavaNext,
        *,
        parts: Parts,
        dtype: torch.dtype,
        lora: Lora | None,
        quirks: Quirks,
    ) -> None:
        self.source, self.model, self.parts, self.dtype, self.lora, self.quirks = source, model, parts, dtype, lora, quirks
        text = model.config.text_config
        self.encoder = BatchEncoder(model, PromptEncoder.read(source.folder, source.said(text.wording), text.max_tokens))
        self.device = self.encoder.device
        self.spec: TileSpec
        self.spec, mean, std = preprocessing(source.folder, model.config)
        self.encoder.mean, self.encoder.std = mean.to(self.device), std.to(self.device)
        self._pad = self._pad_id() if quirks.attend_pads else 0

    @classmethod
    def load(
        cls,
        model: str,
        *,
        parts: Parts = "language",
        device: str = "auto",
        dtype: str = "auto",
        quantize: Literal["nf4"] | None = None,
        lora: Lora | None = None,
        checkpointing: bool = False,
        quirks: Quirks | None = None,
        seed: int = 0,
    ) -> "Tuned":
        """A LLaVA-NeXT by name, hub id or folder, in training mode.

        parts: "language" reads nothing of the vision tower and the projector; only texts can be embedded then.
        dtype: the precision of what is computed, and of weights that do not learn.
        quantize: "nf4" keeps the language model's linear layers in 4 bit, doubly quantised; then `lora` is needed.
        lora: None trains all weights of `parts`; else those of a new adapter, drawn from `seed`, and nothing else.
        checkpointing: computes each layer again on the way back, which needs less memory and a third more time.
        quirks: ways of the published code to repeat.

        Raises what `Embedder.load` does, and UsageError for what does not go together.
        """
        if quantize is not None and lora is None:
            raise UsageError("weights in 4 bit do not learn: train an adapter on them (lora), or leave quantize out")
        source = registry.resolve(model)
        raw = checkpoint.read_json(source.folder / "config.json")
        if raw.get("model_type") != "llava_next":
            raise ModelError(f"{model} is a {raw.get('model_type') or 'nameless'!r} model; only LLaVA-NeXT can be tuned")
        config = LlavaNextConfig.from_json(raw)
        where = checkpoint.pick_device(device)
        precision = checkpoint.pick_dtype(dtype, where, config.text_config.parameters)
        stored = torch.float32 if lora is None else precision
        four_bit = None if quantize is None else "4bit"
        net = checkpoint.load_model(source.folder, config, where, stored, four_bit, sees=parts == "all")
        net.language_model.checkpointing = checkpointing
        if lora is None:
            net.requires_grad_(True)
        else:
            _add_adapter(net, lora, quantize is not None, seed)
        tuned = cls(source, net, parts=parts, dtype=precision, lora=lora, quirks=quirks or Quirks())
        tuned.train(True)
        return tuned

    def trainable(self) -> dict[str, nn.Parameter]:
        """What learns, by the name in `model`."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def train(self, mode: bool) -> None:
        """With dropout or without."""
        self.model.train(mode)
        for module in self.model.modules():
            # bitsandbytes' layers have no dropout, but repack their weights outside training, and then give no gradient
            if type(module).__module__.startswith("bitsandbytes."):
                module.train(True)

    # inputs to rows

    def prepare(self, image: Image.Image) -> Tiles:
        """An upright RGB picture -> tiles."""
        return cut(image, self.spec)

    def text_rows(self, sentences: Sequence[str], prompts: str = "sts", max_tokens: int = 32) -> list[Row]:
        """Of a sentence, `max_tokens` are kept; then the prompt is put around it."""
        prompt = load_prompts(prompts).get("text")
        short = self.encoder.shortened(sentences, max_tokens)
        encode = plain_ids if self.quirks.plain_template else PromptEncoder.encode
        return [Row(ids, None, len(ids)) for ids in encode(self.encoder.prompts, prompt, short)]

    def picture_rows(self, tiles: Sequence[Tiles], prompts: str = "retrieval") -> list[Row]:
        [ids] = self.encoder.prompts.encode(load_prompts(prompts).get("image"), [""])
        return [self._seen(ids, picture) for picture in tiles]

    def composed_rows(
        self, tiles: Sequence[Tiles], changes: Sequence[str], prompts: str = "cirr", max_tokens: int = 32
    ) -> list[Row]:
        short = self.encoder.shortened(changes, max_tokens)
        rows = self.encoder.prompts.encode(load_prompts(prompts).get("composed"), short)
        return [self._seen(ids, picture) for ids, picture in zip(rows, tiles, strict=True)]

    # rows to embeddings

    def embed(self, rows: Sequence[Row]) -> Tensor:
        """(n, d). In pieces of `encoder.batches.tokens`, sorted by length, so there is next to no padding. Texts of a piece
        share what they have in common at their beginning, and its draws of dropout.
        """
        with self._precision():
            if self.quirks.attend_pads:
                return self._attended(rows).float()
            pictures = [row.tiles for row in rows if row.tiles is not None]
            if not pictures:
                return self.encoder.read([row.ids for row in rows]).float()
            visual = iter(self.encoder.full_features(pictures))
            inputs = self.encoder.rows([row.ids for row in rows], [None if r.tiles is None else next(visual) for r in rows])
            return self.encoder.last(inputs).float()

    def texts(self, sentences: Sequence[str], prompts: str = "sts", max_tokens: int = 32) -> Tensor:
        """(n, d)"""
        return self.embed(self.text_rows(sentences, prompts, max_tokens))

    def pictures(self, tiles: Sequence[Tiles], prompts: str = "retrieval") -> Tensor:
        """(n, d)"""
        return self.embed(self.picture_rows(tiles, prompts))

    def composed(self, tiles: Sequence[Tiles], changes: Sequence[str], prompts: str = "cirr", max_tokens: int = 32) -> Tensor:
        """(n, d)"""
        return self.embed(self.composed_rows(tiles, changes, prompts, max_tokens))

    def _seen(self, ids: list[int], tiles: Tiles) -> Row:
        if self.parts == "language":
            raise UsageError('the model was loaded without its vision tower: pictures need parts="all"')
        if self.quirks:
            raise UsageError("the quirks of the published code are those of its training on texts: pictures have none")
        return Row(ids, tiles, len(ids) - 1 + token_count(tiles.size, self.spec))

    def _attended(self, rows: Sequence[Row]) -> Tensor:
        # the rows of a call are one padded batch, as the published code's are
        return attended(self.model.language_model, [row.ids for row in rows], self._pad)

    def _pad_id(self) -> int:
        pad = named(tokenizer_settings(self.source.folder), "pad_token")
        if pad is None:
            raise UsageError(f"{self.source.folder} names no pad token: attend_pads needs one")
        return self.encoder.prompts.id(pad)

    def _precision(self) -> AbstractContextManager[None]:
        # weights that learn are float32, whatever is computed with: in half precision small steps would be rounded away
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        return cast(AbstractContextManager[None], autocast)


def _add_adapter(net: LlavaNext, lora: Lora, quantized: bool, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    vars(net)["is_loaded_in_4bit"] = quantized  # which of its layers peft wraps, it asks the model
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=TARGETS, init_lora_weights=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, net)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
