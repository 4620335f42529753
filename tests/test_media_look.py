"""Looks: real photos are known again after what people do to photos, and told from each other."""

from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, photo
from PIL import Image, ImageEnhance

from e5v_search import media
from e5v_search.media.look import CUTS, alike, look

SAMPLES = sorted((Path(media.__file__).parent.parent / "samples").glob("*.jpg"))


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom))))


CHANGES = {
    "quality": lambda image: media.open_picture(encoded(image, "JPEG", quality=25)),
    "half": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.3),
    "squashed": lambda image: image.resize((224, 224)),
    "cut all around": lambda image: cropped(image, 0.06, 0.06, 0.06, 0.06),
    "cut below": lambda image: cropped(image, 0, 0, 0, 0.03),
    "turned a little": lambda image: image.rotate(1, Image.Resampling.BICUBIC),
}


@pytest.fixture(scope="module")
def looks() -> np.ndarray:
    return np.array([look(media.open_picture(path)) for path in SAMPLES])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photo_is_known_and_told_from_the_others(looks: np.ndarray, change: str) -> None:
    changed = np.array([look(CHANGES[change](media.open_picture(path))) for path in SAMPLES])
    assert alike(looks, changed).tolist() == np.eye(len(SAMPLES), dtype=bool).tolist()


def test_looks_have_length_one(looks: np.ndarray) -> None:
    assert looks.shape[:2] == (len(SAMPLES), len(CUTS))
    np.testing.assert_allclose(np.linalg.norm(looks.astype(np.float32), axis=-1), 1, atol=1e-3)


def test_pictures_of_one_colour() -> None:
    black, nearly, white, drawn = (
        look(image)[None]
        for image in (*(Image.new("RGB", (40, 30), grey) for grey in ("#000", "#101010", "#fff")), photo(40, 30))
    )
    assert alike(black, nearly).all()
    assert not alike(black, white).any()
    assert not alike(black, drawn).any()


def test_a_single_pixel() -> None:
    assert np.isfinite(look(Image.new("RGB", (1, 1), "red"))).all()
