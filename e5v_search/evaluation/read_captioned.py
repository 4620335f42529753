"""Pictures with captions: Karpathy's files, caption files of Flickr, and a user's own folder."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from e5v_search.errors import DataError
from e5v_search.evaluation.files import PhotoFolders, digest, first_of, json_file, json_object, text_lines
from e5v_search.evaluation.records import Caption, Captioned, Loaded, PhotoFile

CAPTIONS = 5  # of a picture; COCO has six or seven of some, and the first five count

_FILE_COLUMNS = ("file", "file_name", "filename", "image", "photo", "path")
_TEXT_COLUMNS = ("caption", "captions", "text")
_OWN = ("captions.csv", "captions.jsonl", "captions.txt", "captions.tsv")


def flickr30k(data: Path) -> Loaded:
    places = ("dataset_flickr30k.json", "flickr30k_test1k.json", "karpathy/flickr30k_test1k.json", "results_20130124.token")
    path = first_of(data, places, "captions of Flickr30K")
    folders = PhotoFolders(data, ("flickr30k-images", "flickr30k_images", "images", "flickr8k/images", "."))
    if path.suffix == ".token":
        names = first_of(data, ("flickr30k_test.txt", "test.txt"), "list of the test pictures (Karpathy's 1,000)")
        return _from_token_file(path, names, folders)
    return _from_json(path, folders)


def coco(data: Path) -> Loaded:
    places = ("dataset_coco.json", "coco_test5k.json", "karpathy/coco_test5k.json")
    path = first_of(data, places, "captions of COCO in Karpathy's split")
    return _from_json(path, PhotoFolders(data, (".", "val2014", "images", "images/val2014", "coco_mini/images")))


def coco_mini(data: Path) -> Loaded:
    path = first_of(data, ("coco_mini/captions.json", "captions.json"), "captions of coco-mini")
    return _from_json(path, PhotoFolders(path.parent, ("images", ".")))


def flickr8k(data: Path) -> Loaded:
    path = first_of(data, ("Flickr8k.token.txt", "flickr8k/Flickr8k.token.txt"), "captions of Flickr8k")
    folders = PhotoFolders(path.parent, ("images", "Flicker8k_Dataset", "Flickr8k_Dataset"))
    return _from_token_file(path, first_of(path.parent, ("Flickr_8k.testImages.txt",), "list of the test pictures"), folders)


def folder(data: Path) -> Loaded:
    """A user's photos with a captions file beside them: captions.csv, .jsonl, .tsv, or .txt with `file<TAB>caption` lines.

    A caption that several photos share is right for each of them, and a search for one of several finds either.
    """
    path = first_of(data, _OWN, "file of captions")
    photos: dict[str, int] = {}
    owners: dict[str, list[int]] = {}
    for _, file, text in own_rows(path):
        at = photos.setdefault(file, len(photos))
        if at not in owners.setdefault(text, []):
            owners[text].append(at)
    if not photos:
        raise DataError(f"{path} has no captions")
    folders = PhotoFolders(data, (".",))
    gallery = tuple(folders.source(file) for file in photos)
    captions = tuple(Caption(text, tuple(own)) for text, own in owners.items())
    return Loaded(Captioned(gallery, captions), str(data), digest([path]))


def _captioned(photos: Iterable[tuple[PhotoFile, list[str]]]) -> Captioned:
    gallery, captions = [], []
    for at, (photo, texts) in enumerate(photos):
        gallery.append(photo)
        captions += [Caption(text, (at,)) for text in texts[:CAPTIONS]]
    return Captioned(tuple(gallery), tuple(captions))


def _from_json(path: Path, folders: PhotoFolders) -> Loaded:
    """Karpathy's own file, or a list of its test part: `file_name`, `captions`, and other names of the picture."""
    found = json_file(path)
    try:
        if isinstance(found, dict):
            photos = [_karpathy(entry, folders) for entry in found["images"] if entry["split"] == "test"]
        else:
            photos = [_listed(entry, folders) for entry in found]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not in the layout of Karpathy's files: {type(error).__name__} {error}") from error
    return Loaded(_captioned(photos), str(path), digest([path]))


def _karpathy(entry: dict[str, Any], folders: PhotoFolders) -> tuple[PhotoFile, list[str]]:
    name = entry["filename"]
    return folders.source(name, f"{entry.get('filepath', '.')}/{name}"), [s["raw"] for s in entry["sentences"]]


def _listed(entry: dict[str, Any], folders: PhotoFolders) -> tuple[PhotoFile, list[str]]:
    also = [entry["flickr8k_file"]] if "flickr8k_file" in entry else []
    if "image_id" in entry:
        also.append(f"{entry['image_id']:012d}.jpg")
    return folders.source(entry["file_name"], *also), entry["captions"]


def _from_token_file(path: Path, names: Path, folders: PhotoFolders) -> Loaded:
    """Captions in lines `<file>#<n><TAB>caption`, and the file names of a split, one a line."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(text_lines(path), 1):
        key, tab, text = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        if not (tab and mark and text.strip()):
            raise DataError(f"{path}:{number}: `file#n<TAB>caption` is needed, not {line[:80]!r}")
        captions.setdefault(name, []).append(text)
    wanted = [name if name.endswith(".jpg") else f"{name}.jpg" for line in text_lines(names) if (name := line.strip())]
    if unknown := [name for name in wanted if name not in captions]:
        raise DataError(f"{path} has no captions of {unknown[0]} ({len(unknown)} such pictures of {names.name})")
    photos = ((folders.source(name), captions[name]) for name in wanted)
    return Loaded(_captioned(photos), str(path), digest([path, names]))


def own_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, file, caption) of each caption of a user's captions file. DataError names the line of a bad row."""
    lines = text_lines(path)
    if path.suffix == ".jsonl":
        rows: Iterable[tuple[int, Any]] = ((n, json_object(path, n, line)) for n, line in enumerate(lines, 1) if line.strip())
    elif path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO("\n".join(lines)))
        rows = ((reader.line_num, row) for row in reader)
    else:
        rows = ((n, dict(zip(("file", "text"), line.split("\t", 1), strict=False))) for n, line in enumerate(lines, 1) if line)
    for number, row in rows:
        file = next((row[key] for key in _FILE_COLUMNS if row.get(key)), None)
        text = next((row[key] for key in _TEXT_COLUMNS if row.get(key)), None)
        texts = [t.strip() for t in (text if isinstance(text, list) else [text]) if isinstance(t, str) and t.strip()]
        if not isinstance(file, str) or not texts:
            raise DataError(
                f"{path}:{number}: a row needs a file ({', '.join(_FILE_COLUMNS)}) and a caption ({', '.join(_TEXT_COLUMNS)}), "
                f"not {str(row)[:80]}"
            )
        yield from ((number, file, t) for t in texts)
