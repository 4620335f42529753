"""LLaVA-NeXT in plain torch: a CLIP vision tower, a projector, a LLaMA or Mistral decoder.

Only what an embedding needs: no logits, vision layers up to the one that is read, of the last text layer one position.
Parameter names are those of transformers' LlavaNextModel, so that checkpoints and adapters fit; the tests hold this
file equal to transformers' whole model. Our own because importing transformers' modelling code alone costs more than
a cold search may (benchmarks/LOG.md), and because speed is won here.

Shapes: b batch, t tokens, d hidden size, T tiles, p patches of a tile.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e5v_search.backbones.config import LlavaNextConfig, TextConfig, VisionConfig
from e5v_search.backbones.layout import Kernel, Layout, Packed, Padded, attention
from e5v_search.backbones.pieces import in_pieces
from e5v_search.backbones.tiles import Size, unpadded


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def table(rows: int, d: int) -> nn.Embedding:
    """An embedding table without torch's random values, which on the meta device cost the import of its compiler."""
    return nn.Embedding(rows, d, _weight=torch.empty(rows, d))


class VisionAttention(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.fc1, self.fc2 = nn.Linear(c.hidden_size, c.intermediate_size), nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class VisionLayer(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = VisionAttention(c), VisionMLP(c)
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return in_pieces(lambda x: x + self.mlp(self.layer_norm2(x)), x)


class VisionEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=False)
        self.position_embedding = table((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(pixels), 1, -1), patches), dim=1)
        return x + self.position_embedding.weight


class VisionEncoder(nn.Module):
    def __init__(self, c: VisionConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(layers))


class VisionTower(nn.Module):
    """(T, 3, tile, tile) -> (T, 1 + p, d_vision): the hidden state after `layers` layers."""

    def __init__(self, c: VisionConfig, layers: int) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)  # sic: CLIP's own spelling
        self.encoder = VisionEncoder(c, layers)

    def forward(self, pixels: Tensor) -> Tensor:
        x: Tensor = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class Projector(nn.Module):
    def __init__(self, c: LlavaNextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.projector_hidden_act]
        self.linear_1 = nn.Linear(c.vision_config.hidden_size, c.text_config.hidden_size, bias=c.multimodal_projector_bias)
        self.linear_2 = nn.Linear(c.text_config.hidden_size, c.text_config.hidden_size, bias=c.multimodal_projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return y


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


Rotation = tuple[Tensor, Tensor]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary position embedding; x (places, heads, d_head), rotation (places, 1, d_head) cosines and sines."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class TextAttention(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_bias)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(self._heads(self.k_proj(x)), rotation), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rotation: Rotation, attend: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = self.o_proj(attend(rotate(self._heads(self.q_proj(x)), rotation)).flatten(-2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class TextMLP(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


class TextLayer(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = TextAttention(c), TextMLP(c)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, normed: Tensor, rotation: Rotation, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """`normed` is x after the input norm, which the keys and values that `attend` sees were made from too."""
        x = x + self.self_attn(normed, rotation, attend)
        return in_pieces(lambda x: x + self.mlp(self.post_attention_layernorm(x)), x)


class TextDecoder(nn.Module):
    """Causal. Tokens lie as a `Layout` says.

    A row may go on from a prefix that was computed before: a tensor (layers, 2, p, key heads, d_head) of its keys and
    values; a single one is that of all rows.

    With `checkpointing` a backward pass computes each layer once more instead of keeping what it saw: memory for time.
    """

    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.c = c
        self.checkpointing = False
        self.embed_tokens = table(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(TextLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def rotation(self, positions: Tensor, like: Tensor) -> Rotation:
        """positions (places) -> cosines and sines (places, 1, d_head)"""
        # angles in float32 whatever the model's precision: at position 3,000 half precision is off by whole turns
        exponent = torch.arange(0, self.c.head_dim, 2, dtype=torch.float32, device=like.device) / self.c.head_dim
        angles = positions[..., None, None].float() * self.c.rope_theta**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(places, d) input embeddings -> (b, d), the state at each row's last token after the final norm. The last layer
        computes keys and values alone for all others.
        """
        cos, sin = rotation = self.rotation(layout.positions, x)
        at_last = layout.last(cos), layout.last(sin)

        def through(i: int, x: Tensor) -> Tensor:
            layer = cast(TextLayer, self.layers[i])
            h = layer.input_layernorm(x)
            k, v = (layout.behind_prefix(i, j, new) for j, new in enumerate(layer.self_attn.keys_values(h, rotation)))
            y: Tensor
            if i < len(self.layers) - 1:
                y = layer(x, h, rotation, partial(layout.attend, k=k, v=v))
            else:
                y = layer(layout.last(x), layout.last(h), at_last, partial(layout.attend_last, k=k, v=v))
            return y

        y: Tensor = self.norm(self.in_turn(through, x))
        return y

    def in_turn(self, through: Callable[[int, Tensor], Tensor], x: Tensor) -> Tensor:
        """`through(i, x)` of every layer i, each on what the one before it gave."""
        for i in range(len(self.layers)):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(through, i, x, use_reentrant=False)
            else:
                x = through(i, x)
        return x

    def states(self, x: Tensor) -> Tensor:
        """(b, t, d) input embeddings -> (b, t, d), the state at every position after the final norm: for training."""
        rotation = self.rotation(torch.arange(x.shape[1], device=x.device)[None], x)

        def through(i: int, x: Tensor) -> Tensor:
            layer = cast(TextLayer, self.layers[i])
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, rotation)
            y: Tensor = layer(x, h, rotation, partial(attention, k=k, v=v))
            return y

        y: Tensor = self.norm(self.in_turn(through, x))
        return y

    def prefill(self, x: Tensor, layout: Padded | Packed, lengths: Sequence[int]) -> list[Tensor]:
        """(places, d) input embeddings of rows of `lengths` tokens -> each row's keys and values, a tensor of its own."""
        rotation = self.rotation(layout.positions, x)
        heads = self.c.num_key_value_heads, self.c.head_dim
        out = [x.new_empty(len(self.layers), 2, n, *heads) for n in lengths]
        for i, layer in enumerate(cast(Sequence[TextLayer], self.layers)):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, rotation)
            for j, new in enumerate((k, v)):
                for prefix, row in zip(out, layout.split(new, lengths), strict=True):
                    prefix[i, j] = row
            if i < len(self.layers) - 1:
                x = layer(x, h, rotation, partial(layout.attend, k=k, v=v))
        return out


class LlavaNext(nn.Module):
    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config, config.vision_layers)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = TextDecoder(config.text_config)
        self.kernel: Kernel | None = None  # with one, rows are packed

    def image_features(self, pixels: Tensor, sizes: Sequence[Size], grids: Sequence[Size]) -> list[Tensor]:
        """Visual tokens of each picture, (n_i, d): its base tile, then its unpadded rows, if any, each ended by a newline.

        pixels (T, 3, tile, tile) normalised, the tiles of all pictures one after the other;
        sizes (height, width) of the pictures in pixels; grids (rows, cols) of their tiles.
        """
        features = self.multi_modal_projector(self.vision_tower(pixels)[:, self.config.skip_class_token :])
        counts = [1 + rows * cols for rows, cols in grids]
        return [self._pack(tiles, size, grid) for tiles, size, grid in zip(features.split(counts), sizes, grids, strict=True)]

    def _pack(self, tiles: Tensor, size: Size, grid: Size) -> Tensor:
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        rows, cols = grid
        if not rows:
            return tiles[0]
        # (rows·cols, p, d) -> one map of patches (rows·side, cols·side, d)
        patches = tiles[1:].reshape(rows, cols, side, side, -1).transpose(1, 2).reshape(rows * side, cols * side, -1)
        keep_rows, keep_cols = unpadded(size, (rows * side, cols * side))
        patches = patches[keep_rows, keep_cols]
        newline = self.image_newline.expand(len(patches), 1, -1)
        return torch.cat((tiles[0], torch.cat((patches, newline), dim=1).flatten(0, 1)))

    def last_hidden(self, rows: Sequence[Tensor], prefixes: Sequence[Tensor] | None = None) -> Tensor:
        """The state at the last position of each row of input embeddings (n_i, d), in one batch: (b, d).

        With `prefixes` (see `TextDecoder`) a row goes on from what was computed before.
        """
        out: Tensor = self.language_model(*self._laid_out(rows, prefixes))
        return out

    def prefill(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values of rows (n_i, d) that begin other rows, each (layers, 2, n_i, key heads, d_head)."""
        return self.language_model.prefill(*self._laid_out(rows), [len(row) for row in rows])

    def _laid_out(self, rows: Sequence[Tensor], prefixes: Sequence[Tensor] | None = None) -> tuple[Tensor, Padded | Packed]:
        return Padded.of(rows, prefixes) if self.kernel is None else Packed.of(rows, self.kernel, prefixes)
