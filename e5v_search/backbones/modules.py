"""LLaVA-NeXT in plain torch: a CLIP vision tower, a projector, a LLaMA or Mistral decoder.

Only what an embedding needs: no logits, vision layers up to the one that is read, of the last text layer one position.
Parameter names are those of transformers' LlavaNextModel, so that checkpoints and adapters fit; the tests hold this
file equal to transformers' whole model. Our own because importing transformers' modelling code alone costs more than
a cold search may (benchmarks/LOG.md), and because speed is won here.

Shapes: b batch, t tokens, d hidden size, T tiles, p patches of a tile.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e5v_search.backbones.config import LlavaNextConfig, TextConfig, VisionConfig
from e5v_search.backbones.pieces import in_pieces
from e5v_search.backbones.tiles import Size, unpadded
from e5v_search.backbones.upload import indices


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
    """Rotary position embedding; x (b, heads, t, d_head), rotation (b or 1, 1, t, d_head) cosines and sines."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class TextAttention(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.grouped = c.num_key_value_heads != c.num_attention_heads
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias)
        self.o_proj = nn.Linear(q, c.hidden_size, bias=c.attention_bias)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        return rotate(self._heads(self.k_proj(x)), rotation), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """Without a mask: causal, and x stands where k and v were made."""
        q = rotate(self._heads(self.q_proj(x)), rotation)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


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

    def forward(self, x: Tensor, normed: Tensor, k: Tensor, v: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """`normed` is x after the input norm, which the keys and values were made from too."""
        x = x + self.self_attn(normed, k, v, rotation, mask)
        return in_pieces(lambda x: x + self.mlp(self.post_attention_layernorm(x)), x)


class TextDecoder(nn.Module):
    """Causal: rows shorter than the batch are padded on the *right*, where nothing real can see the padding.

    A row may go on from a prefix that was computed before: a tensor (layers, 2, key heads, p, d_head) of its keys and
    values; a single one is that of all rows. Every key stands at its row's own position, so causality is all that the
    mask has to hold.

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
        """positions (b or 1, t) -> cosines and sines (b or 1, 1, t, d_head)"""
        # angles in float32 whatever the model's precision: at position 3,000 half precision is off by whole turns
        exponent = torch.arange(0, self.c.head_dim, 2, dtype=torch.float32, device=like.device) / self.c.head_dim
        angles = positions[:, None, :, None].float() * self.c.rope_theta**-exponent
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, x: Tensor, lengths: Tensor, prefixes: Sequence[Tensor] | None = None) -> Tensor:
        """(b, t, d) input embeddings, of which `lengths` (b,) are real -> (b, d), the state at each row's last one after
        the final norm. The last layer computes keys and values alone for all other positions.
        """
        b, t = x.shape[:2]
        last = lengths - 1
        starts = indices([p.shape[3] for p in prefixes], x.device) if prefixes else last.new_zeros(1)
        positions = starts[:, None] + torch.arange(t, device=x.device)
        rotation = self.rotation(positions, x)
        keys = torch.arange(t if prefixes is None else max(p.shape[3] for p in prefixes) + t, device=x.device)
        mask = None if prefixes is None else keys <= positions[:, None, :, None]

        def through(i: int, x: Tensor) -> Tensor:
            layer = cast(TextLayer, self.layers[i])
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, rotation)
            if prefixes is not None:
                k, v = (_behind([p[i, j] for p in prefixes], new, len(keys)) for j, new in enumerate((k, v)))
            y: Tensor
            if i < len(self.layers) - 1:
                y = layer(x, h, k, v, rotation, mask)
                return y
            each = torch.arange(b, device=x.device)
            x, h = x[each, last][:, None], h[each, last][:, None]
            ends = (starts + last)[:, None]
            y = layer(x, h, k, v, self.rotation(ends, x), keys <= ends[:, None, :, None])
            return y

        y: Tensor = self.norm(self.in_turn(through, x)[:, 0])
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
            y: Tensor = layer(x, h, *layer.self_attn.keys_values(h, rotation), rotation, None)
            return y

        y: Tensor = self.norm(self.in_turn(through, x))
        return y

    def prefill(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """(b, t, d) input embeddings, of which `lengths` are real -> each row's keys and values, a tensor of its own."""
        rotation = self.rotation(torch.arange(x.shape[1], device=x.device)[None], x)
        shape = (len(self.layers), 2, self.c.num_key_value_heads)
        out = [x.new_empty(*shape, n, self.c.head_dim) for n in lengths]
        for i, layer in enumerate(cast(Sequence[TextLayer], self.layers)):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, rotation)
            for row, prefix in enumerate(out):
                prefix[i, 0], prefix[i, 1] = (new[row, :, : lengths[row]] for new in (k, v))
            if i < len(self.layers) - 1:
                x = layer(x, h, k, v, rotation, None)
        return out


def _behind(old: Sequence[Tensor], new: Tensor, length: int) -> Tensor:
    """Each row's old keys or values (heads, p_i, d_head), or one for all, and behind them its new ones (b, heads, t, d_head),
    in `length` places; what is left is zero: masked, but a stray NaN would come through.
    """
    b, heads, t, d_head = new.shape
    if len(old) == 1:
        return torch.cat((old[0].expand(b, -1, -1, -1), new), dim=2)
    out = new.new_zeros(b, heads, length, d_head)
    for row, past in enumerate(old):
        p = past.shape[1]
        out[row, :, :p], out[row, :, p : p + t] = past, new[row]
    return out


class LlavaNext(nn.Module):
    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config.vision_config, config.vision_layers)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.language_model = TextDecoder(config.text_config)

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
        """The state at the last position of each row of input embeddings (n_i, d), in one padded batch: (b, d).

        With `prefixes` (see `TextDecoder`) a row goes on from what was computed before.
        """
        lengths = indices([len(row) for row in rows], rows[0].device)
        out: Tensor = self.language_model(nn.utils.rnn.pad_sequence(list(rows), batch_first=True), lengths, prefixes)
        return out

    def prefill(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values of rows (n_i, d) that begin other rows, each (layers, 2, key heads, n_i, d_head)."""
        x = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return self.language_model.prefill(x, [len(row) for row in rows])
