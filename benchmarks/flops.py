"""Arithmetic that an embedding needs (2 for a multiplication with addition): layers that run, causal attention, no logits."""

from e5v_search.backbones.config import LlavaNextConfig


def vision(c: LlavaNextConfig, tiles: int) -> int:
    """Tiles through the vision tower, as far as it runs, and the projector."""
    v, d = c.vision_config, c.text_config.hidden_size
    p = (v.image_size // v.patch_size) ** 2
    t = p + 1
    linear = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    layers = c.vision_layers * (2 * t * linear + 4 * t * t * v.hidden_size)
    patches = 2 * p * 3 * v.patch_size**2 * v.hidden_size
    return tiles * (patches + layers + 2 * p * (v.hidden_size * d + d * d))


def language(c: LlavaNextConfig, tokens: int) -> int:
    """A row of `tokens`, a picture's among them, through all layers of the language model."""
    t = c.text_config
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    linear = t.hidden_size * (2 * q + 2 * kv + 3 * t.intermediate_size)
    return t.num_hidden_layers * (2 * tokens * linear + 2 * tokens * tokens * q)
