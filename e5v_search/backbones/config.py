"""The parts of a LLaVA-NeXT `config.json` that an embedding depends on, in the layouts of transformers 4.41 to 5."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from e5v_search.backbones.tiles import Size
from e5v_search.errors import ModelError
from e5v_search.prompts import WORDINGS, Wording

_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower. Defaults are those of transformers' CLIPVisionConfig: published configs leave them out."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class TextConfig:
    """LLaMA or Mistral decoder. Defaults are those of LlamaConfig, `from_json` knows Mistral's."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def wording(self) -> Wording:
        """How the models of the paper are spoken to that have this decoder."""
        return WORDINGS["llama3" if self.model_type == "llama" else "mistral"]

    @property
    def max_tokens(self) -> int:
        """The longest input that attention treats as trained: we do not implement a sliding window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def parameters(self) -> int:
        """Of the layers, roughly: for what depends on the size of a model alone."""
        return self.num_hidden_layers * self.hidden_size * (self.hidden_size * 4 + self.intermediate_size * 3)


_MISTRAL_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


@dataclass(frozen=True)
class LlavaNextConfig:
    vision_config: VisionConfig
    text_config: TextConfig
    image_grid_pinpoints: tuple[Size, ...] = _PINPOINTS
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True

    @property
    def vision_layers(self) -> int:
        """Layers of the vision tower that run: hidden state i is read after i layers."""
        n = self.vision_config.num_hidden_layers
        return self.vision_feature_layer if self.vision_feature_layer >= 0 else n + 1 + self.vision_feature_layer

    @property
    def skip_class_token(self) -> int:
        return 1 if self.vision_feature_select_strategy == "default" else 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LlavaNextConfig":
        """From the parsed config.json. Raises ModelError naming what we would get silently wrong."""
        text = dict(data.get("text_config") or {})
        kind = text.setdefault("model_type", "llama")
        if kind not in ("llama", "mistral"):
            raise ModelError(f"text model {kind!r} is not supported in LLaVA-NeXT; known: llama, mistral")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ModelError(f"rotary scaling {rope_type!r} is not supported; only unscaled rotary positions are")
        if "rope_theta" in rope:
            text["rope_theta"] = rope["rope_theta"]
        if kind == "mistral":
            text = _MISTRAL_DEFAULTS | text
        layer = data.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise ModelError(f"several vision feature layers ({layer}) are not supported; LLaVA-NeXT reads one")
        top: dict[str, Any] = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        top["image_token_id"] = data.get("image_token_id", data.get("image_token_index", 32000))
        top["image_grid_pinpoints"] = tuple((int(h), int(w)) for h, w in data.get("image_grid_pinpoints") or _PINPOINTS)
        top["vision_config"] = _pick(VisionConfig, data.get("vision_config") or {})
        top["text_config"] = _pick(TextConfig, text)
        return cls(**top)


_C = TypeVar("_C", VisionConfig, TextConfig)


def _pick(kind: type[_C], data: Mapping[str, Any]) -> _C:
    # null stands for "the default" in published configs, but for a sliding window it means none
    known = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in data.items() if k in known and (v is not None or k == "sliding_window")})
