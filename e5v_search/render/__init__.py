"""Text to picture: rendered text is embedded as the photos are (the paper's I2I protocol)."""

from e5v_search.render.page import HEIGHT, MARGIN, WIDTH, Box, render, words

__all__ = ["HEIGHT", "MARGIN", "WIDTH", "Box", "render", "words"]
