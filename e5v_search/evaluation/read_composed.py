"""Composed image retrieval in the layout of the original releases: CIRR and FashionIQ."""

from pathlib import Path
from typing import Any

from e5v_search.errors import DataError
from e5v_search.evaluation.files import PhotoFolders, digest, first_of, json_file
from e5v_search.evaluation.records import Change, Composed, Loaded

CATEGORIES = ("dress", "shirt", "toptee")


def cirr(data: Path, split: str = "val") -> Loaded:
    """CIRR rc2, split "val" or "test1"; the gallery is the whole split, in the order of its file."""
    captions = first_of(data, (f"captions/cap.rc2.{split}.json", f"cirr/captions/cap.rc2.{split}.json"), "captions of CIRR")
    root = captions.parent.parent
    images = first_of(root, (f"image_splits/split.rc2.{split}.json",), "list of CIRR's pictures")
    folders = PhotoFolders(root, ("img_raw", "images", "."))
    places: dict[str, str] = json_file(images)
    at = {name: i for i, name in enumerate(places)}
    try:
        queries = tuple(_cirr_query(entry, at) for entry in json_file(captions))
        gallery = tuple(folders.source(name, place, f"{name}.png") for name, place in places.items())
    except (KeyError, TypeError) as error:
        raise DataError(f"{captions} and {images} do not fit together: {type(error).__name__} {error}") from error
    return Loaded(Composed(gallery, queries), str(root), digest([captions, images]))


def _cirr_query(entry: dict[str, Any], at: dict[str, int]) -> Change:
    reference = entry["reference"]
    target = at[entry["target_hard"]] if "target_hard" in entry else None
    members = tuple(at[name] for name in entry["img_set"]["members"] if name != reference)
    return Change(str(entry["pairid"]), at[reference], (entry["caption"],), target, members)


def fashioniq(data: Path) -> Loaded:
    """FashionIQ's validation split by category; each gallery is that category's whole split."""
    root = first_of(data, ("captions/cap.dress.val.json", "fashioniq/captions/cap.dress.val.json"), "captions of FashionIQ")
    root = root.parent.parent
    folders = PhotoFolders(root, ("images", "resized_image", "."))
    found, files = {}, []
    for category in CATEGORIES:
        captions = root / f"captions/cap.{category}.val.json"
        images = root / f"image_splits/split.{category}.val.json"
        files += [captions, images]
        names: list[str] = json_file(images)
        at = {name: i for i, name in enumerate(names)}
        try:
            queries = tuple(
                Change(f"{category}-{n}", at[entry["candidate"]], tuple(entry["captions"]), at[entry["target"]])
                for n, entry in enumerate(json_file(captions))
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{captions} and {images} do not fit together: {type(error).__name__} {error}") from error
        gallery = tuple(
            folders.source(name, *(f"{p}{name}{s}" for p in ("", f"{category}/") for s in _SUFFIXES)) for name in names
        )
        found[category] = Composed(gallery, queries)
    return Loaded(found, str(root), digest(files))


_SUFFIXES = (".jpg", ".png", ".jpeg")
