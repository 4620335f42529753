"""How many changed photos are known again as duplicates, and how many different ones are taken for such.

    python benchmarks/duplicates.py PHOTOS... [--every 2]

Every second photo of the folders is changed in each of the ways below and embedded with e5v-tiny; a changed photo is found
if its cosine with the original reaches the threshold of `duplicates`, and if the two look alike.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from e5v_search import Embedder, media
from e5v_search.collection.duplicates import THRESHOLD
from e5v_search.media import Scan
from e5v_search.media.look import alike, look


def saved(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return media.open_picture(data.getvalue())


def resized(image: Image.Image, by: float) -> Image.Image:
    return image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.LANCZOS)


def cut(image: Image.Image, part: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(width * part), round(height * part), round(width * (1 - part)), round(height * (1 - part))))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 50": lambda image: saved(image, 50),
    "JPEG quality 25": lambda image: saved(image, 25),
    "1.5 times the size": lambda image: resized(image, 1.5),
    "half the size": lambda image: resized(image, 0.5),
    "contrast +20 %": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "brightness +15 %": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "cut by 3 % at each edge": lambda image: cut(image, 0.03),
    "cut by 8 % at each edge": lambda image: cut(image, 0.08),
    "in grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--every", type=int, default=2)
    asked = parser.parse_args()
    paths = [found.path for folder in asked.photos for found in list(Scan([folder]))[:: asked.every]]
    images = [media.open_picture(path) for path in paths]
    embedder = Embedder.load("e5v-tiny", device="cpu")

    def embedded(pictures: list[Image.Image]) -> np.ndarray:
        return np.concatenate([embedder.embed_images(pictures[n : n + 16]) for n in range(0, len(pictures), 16)])

    x, looks = embedded(images), np.array([look(image) for image in images])
    found = {}
    for name, change in CHANGES.items():
        changed = [change(image) for image in images]
        near = (embedded(changed) * x).sum(axis=1) >= THRESHOLD
        same = np.array([alike(look(c)[None], before[None])[0, 0] for c, before in zip(changed, looks, strict=True)])
        found[name] = {"cosine": float(near.mean()), "look": float(same.mean()), "both": float((near & same).mean())}
        print(f"{name:24} " + "  ".join(f"{what} {share:.1%}" for what, share in found[name].items()), flush=True)
    near, same = np.triu(x @ x.T >= THRESHOLD, 1), np.triu(alike(looks, looks), 1)
    different = {"pairs": len(x) * (len(x) - 1) // 2, "cosine": int(near.sum()), "look": int(same.sum())}
    different["both"] = int((near & same).sum())
    print(different)
    result = {"model": embedder.fingerprint, "threshold": THRESHOLD, "photos": len(x), "found": found, "different": different}
    print(machine.save("duplicates", result))


if __name__ == "__main__":
    main()
