"""Any picture that Pillow opens becomes an upright one in 8-bit RGB."""

from PIL import Image

from e5v_search.media.exif import METADATA, read_orientation

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """`image` turned as its EXIF orientation says, in RGB; what is transparent lies on white.

    Raises what Pillow raises: ValueError for a colour mode that has no way to RGB, OSError for a damaged file.
    """
    image.load()  # some formats know their orientation, or apply it, only then
    return _to_rgb(_turn(image))


def on_its_side(image: Image.Image) -> bool:
    """Whether `upright` will exchange height and width."""
    return read_orientation(image) >= 5


def _turn(image: Image.Image) -> Image.Image:
    """A new picture that no longer says that it needs turning, or `image` itself when it is upright."""
    method = _TURNS.get(read_orientation(image))
    if method is None:
        return image
    turned = image.transpose(method)
    for key in METADATA:
        turned.info.pop(key, None)
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, 32 bits or floating point -> L. Pillow's own conversion clips them at 255."""
    import numpy as np  # a plain photo needs no numpy

    values = np.array(image, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    np.clip(values, -1e30, 1e30, out=values)  # so that the range is finite too
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        # 32 bits do not say what white is: take the smallest usual range that holds them all
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(white for white in usual if high <= white)
    values -= low
    values *= 255.0 / max(high - low, 1e-12)
    values += 0.5
    return Image.fromarray(values.astype(np.uint8))
