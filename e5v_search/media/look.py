"""What a picture looks like from afar: numbers by which the same picture, saved again, is known from a similar one."""

import numpy as np
from PIL import Image

SIDE = 16  # pixels
CUTS = (0.0, 0.04, 0.08)  # of each edge: a picture cut a little is compared with the other cut as much
ALIKE = 0.8
_COARSE_SIDE, _COARSE_WEIGHT = 4, 0.2  # that the sky is bright and the ground dark is true of too many pictures
_FAINT = 2.0  # grey levels; a contrast below that counts as none
_LENGTH = 3 * SIDE * SIDE + 4


def look(image: Image.Image) -> np.ndarray:
    """Rows (len(CUTS), length) float16 of length 1 of an RGB picture, one for each cut.

    The pixels of the picture made tiny, less most of what an even tinier one has: the finer shapes count. The mean colour
    comes in so weakly that it decides between pictures of one colour only.
    """
    rows = np.empty((len(CUTS), _LENGTH), np.float32)
    width, height = image.size
    for row, cut in zip(rows, CUTS, strict=True):
        box = (width * cut, height * cut, width * (1 - cut), height * (1 - cut))
        tiny = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
        coarse = tiny.resize((_COARSE_SIDE, _COARSE_SIDE), Image.Resampling.BOX).resize(tiny.size, Image.Resampling.BICUBIC)
        fine, rough = np.asarray(tiny, dtype=np.float32), np.asarray(coarse, dtype=np.float32)
        mean = rough.mean(axis=(0, 1))
        row[:-4] = (fine - rough + _COARSE_WEIGHT * (rough - mean)).ravel()
        row[-4:] = np.array([1.0, *((mean - 128) / 128)]) * _FAINT * np.sqrt(fine.size)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float16)


def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """-> (n, m) bool: whether the looks a (n, cuts, length) and b (m, cuts, length) are of the same picture."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    best = a[:, 0] @ b[:, 0].T
    for cut in range(1, len(CUTS)):
        np.maximum(best, a[:, cut] @ b[:, 0].T, out=best)
        np.maximum(best, a[:, 0] @ b[:, cut].T, out=best)
    same: np.ndarray = best >= ALIKE
    return same
