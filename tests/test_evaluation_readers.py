"""Readers of data sets: every layout made here, the real annotation files where they lie beside the project."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from e5v_search.errors import DataError
from e5v_search.evaluation import read_captioned, read_composed, read_hub, read_sts
from e5v_search.evaluation.records import Captioned, Composed, Loaded, Rating, absent

SHARED = Path(__file__).parent.parent.parent / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")


def photo(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def captions(loaded: Loaded) -> list[tuple[str, tuple[int, ...]]]:
    assert isinstance(loaded.data, Captioned)
    return [(caption.text, caption.owners) for caption in loaded.data.captions]


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_karpathy_file(tmp_path: Path) -> None:
    sentences = [{"raw": f"caption {i} ."} for i in range(6)]
    images = [
        {"filename": "b.jpg", "filepath": "val2014", "split": "test", "sentences": sentences},
        {"filename": "a.jpg", "filepath": "val2014", "split": "train", "sentences": sentences},
        {"filename": "c.jpg", "filepath": "val2014", "split": "test", "sentences": sentences[:5]},
    ]
    write(tmp_path / "dataset_coco.json", {"images": images})
    photo(tmp_path / "val2014/b.jpg")
    loaded = read_captioned.coco(tmp_path)
    assert captions(loaded) == [(f"caption {i} .", (at,)) for at in (0, 1) for i in range(5)]  # the first five, no sixth
    assert isinstance(loaded.data, Captioned)
    assert [source.name for source in loaded.data.gallery] == ["b.jpg", "c.jpg"]
    assert absent(loaded.data.gallery) == {1: "no such file"}
    assert loaded.revision.startswith("sha256:")


def test_flickr30k_caption_file(tmp_path: Path) -> None:
    write(tmp_path / "results_20130124.token", "1.jpg#0\tOne .\n1.jpg#1\tUn .\n2.jpg#0\tTwo .\n3.jpg#0\tThree .\n")
    write(tmp_path / "flickr30k_test.txt", "3\n1.jpg\n")
    photo(tmp_path / "flickr30k-images/1.jpg")
    assert captions(read_captioned.flickr30k(tmp_path)) == [("Three .", (0,)), ("One .", (1,)), ("Un .", (1,))]
    write(tmp_path / "flickr30k_test.txt", "4\n")
    with pytest.raises(DataError, match=r"no captions of 4\.jpg"):
        read_captioned.flickr30k(tmp_path)


OWN = {
    "captions.csv": 'file,caption\na.png,"a dog, running"\nb.png,a cat\nb.png,an animal\na.png,an animal\n',
    "captions.jsonl": '{"image": "a.png", "text": "a dog, running"}\n{"image": "b.png", "captions": ["a cat", "an animal"]}\n'
    '\n{"image": "a.png", "caption": "an animal"}\n',
    "captions.txt": "a.png\ta dog, running\nb.png\ta cat\nb.png\tan animal\na.png\tan animal\n",
}


@pytest.mark.parametrize("name", OWN)
def test_own_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "\ufeff" + OWN[name])
    photo(tmp_path / "a.png")
    loaded = read_captioned.folder(tmp_path)
    assert captions(loaded) == [("a dog, running", (0,)), ("a cat", (1,)), ("an animal", (1, 0))]
    assert isinstance(loaded.data, Captioned)
    assert absent(loaded.data.gallery) == {1: "no such file"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("captions.csv", "file,caption\na.png,\n", r"captions\.csv:2: a row needs a file"),
        ("captions.csv", "photo name,what\na.png,dog\n", r":2: a row needs a file \(file, file_name"),
        ("captions.jsonl", '{"file": "a.png", "text": "x"}\n{"file": \n', r"jsonl:2: not JSON"),
        ("captions.jsonl", '["a.png", "x"]\n', r"jsonl:1: an object is needed"),
        ("captions.jsonl", '{"file": "a.png", "captions": [1]}\n', "jsonl:1: a row needs"),
        ("captions.txt", "a.png a dog\n", r"txt:1: a row needs"),
        ("captions.txt", "", "has no captions"),
        ("captions.md", "a.png: a dog", r"no file of captions: looked for captions\.csv, captions\.jsonl"),
    ],
)
def test_own_folder_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=reason):
        read_captioned.folder(tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_bytes(b"a.png\tcaf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_captioned.folder(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder; give the folder of the data set with --data"):
        read_captioned.folder(tmp_path / "none")


def test_json_of_another_layout(tmp_path: Path) -> None:
    write(tmp_path / "dataset_coco.json", {"annotations": []})
    with pytest.raises(DataError, match=r"not in the layout of Karpathy's files: KeyError 'images'"):
        read_captioned.coco(tmp_path)


CIRR_VAL = [
    {
        "pairid": 7,
        "reference": "dev-1",
        "target_hard": "dev-3",
        "caption": "with snow",
        "img_set": {"members": ["dev-2", "dev-1", "dev-3"]},
    }
]


def write_cirr(root: Path) -> None:
    write(root / "captions/cap.rc2.val.json", CIRR_VAL)
    write(root / "image_splits/split.rc2.val.json", {f"dev-{i}": f"./dev/dev-{i}.png" for i in (1, 2, 3)})


def test_cirr(tmp_path: Path) -> None:
    write_cirr(tmp_path)
    for i in (1, 2, 3):
        photo(tmp_path / f"img_raw/dev/dev-{i}.png")
    data = read_composed.cirr(tmp_path).data
    assert isinstance(data, Composed)
    assert not absent(data.gallery)
    [query] = data.queries
    assert (query.key, query.reference, query.texts, query.target) == ("7", 0, ("with snow",), 2)
    assert query.members == (1, 2)  # the reference is no member


def test_cirr_that_does_not_fit_together(tmp_path: Path) -> None:
    write_cirr(tmp_path)
    write(tmp_path / "image_splits/split.rc2.val.json", {"dev-1": "./dev/dev-1.png"})
    with pytest.raises(DataError, match=r"do not fit together: KeyError 'dev-3'"):
        read_composed.cirr(tmp_path)


def test_fashioniq(tmp_path: Path) -> None:
    for category in read_composed.CATEGORIES:
        entry = {"target": f"{category}2", "candidate": f"{category}1", "captions": ["is red", "is long"]}
        write(tmp_path / f"captions/cap.{category}.val.json", [entry])
        write(tmp_path / f"image_splits/split.{category}.val.json", [f"{category}{i}" for i in range(3)])
        photo(tmp_path / f"images/{category}1.png")
    data = read_composed.fashioniq(tmp_path).data
    assert isinstance(data, dict)
    assert list(data) == ["dress", "shirt", "toptee"]
    assert len(data["shirt"].gallery) == 3
    assert absent(data["shirt"].gallery) == {0: "no such file", 2: "no such file"}
    [query] = data["toptee"].queries
    assert (query.reference, query.target, query.texts) == (1, 2, ("is red", "is long"))


def write_sts(root: Path) -> None:
    for folder, subsets in read_sts.SUBSETS.values():
        for i, subset in enumerate(subsets):
            write(root / f"STS/{folder}/STS.input.{subset}.txt", f"a {i}\tb {i}\tsource\nc\td\ne\tf\n")
            write(root / f"STS/{folder}/STS.gs.{subset}.txt", f"{i}.5\n\n0\n")
    line = "main\tx\ty\t1\t{score}\tA man .\tA \u2028 woman .\textra\n"
    write(root / "STS/STSBenchmark/sts-test.csv", line.format(score="2.500"))
    write(root / "SICK/SICK_test_annotated.txt", "pair_ID\tsentence_A\tsentence_B\tscore\n1\tA\tB\t3.3\tNEUTRAL\n")


def test_sts(tmp_path: Path) -> None:
    write_sts(tmp_path)
    loaded = read_sts.sts(tmp_path)
    assert isinstance(loaded.data, Rating)
    tasks = loaded.data.tasks
    assert list(tasks) == ["sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr"]
    # the pair that nobody rated is left out, all subsets stand in one list
    assert [(p.a, p.b, p.gold) for p in tasks["sts13"]] == [
        (a, b, gold) for i in range(3) for a, b, gold in ((f"a {i}", f"b {i}", i + 0.5), ("e", "f", 0.0))
    ]
    assert [(p.a, p.b, p.gold) for p in tasks["stsb"]] == [("A man .", "A \u2028 woman .", 2.5)]
    assert [(p.a, p.b, p.gold) for p in tasks["sickr"]] == [("A", "B", 3.3)]
    assert "lower-cased" in loaded.notes[0]


def test_sts_that_does_not_fit_together(tmp_path: Path) -> None:
    write_sts(tmp_path)
    write(tmp_path / "STS/STS14-en-test/STS.gs.images.txt", "1\n")
    with pytest.raises(DataError, match=r"STS\.input\.images\.txt has 3 lines and STS\.gs\.images\.txt 1"):
        read_sts.sts(tmp_path)
    write(tmp_path / "STS/STS14-en-test/STS.gs.images.txt", "1\n\nhigh\n")
    with pytest.raises(DataError, match=r"STS\.input\.images\.txt:3: two sentences and a number"):
        read_sts.sts(tmp_path)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path: Path) -> read_hub.Open:
    """Tables in the hub's columns, written and read by the real library from local files."""
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    picture = datasets.Image()
    reds = [{"bytes": png(colour), "path": None} for colour in ("red", "green", "blue", "white")]
    tables = {
        "royokong/flickr30k_test": ({"text": [[f"{i} {j}" for j in range(6)] for i in range(2)], "image": reds[:2]}, "image"),
        "royokong/cirr_val": (
            {"caption": ["make it blue"], "candidate_id": ["p1"], "target_id": ["p2"], "candidate": reds[:1]},
            "candidate",
        ),
        "royokong/cirr_test": (
            {"pairid": [9], "caption": ["bluer"], "candidate_id": ["p0"], "candidate": reds[:1]},
            "candidate",
        ),
        "royokong/cirr_imgs": ({"id": ["p0", "p1", "p2"], "img": reds[:3]}, "img"),
        "royokong/fashioniq_val": (
            {
                "caption": [["is red", "is long"], ["is blue", "is short"], ["a", "b"]],
                "candidate_id": ["s0", "d0", "t0"],
                "target_id": ["s1", "d1", "t0"],
                "category": ["shirt", "dress", "toptee"],
            },
            None,
        ),
        "royokong/fashioniq_val_imgs": (
            {
                "id": ["d0", "s0", "d1", "s1", "t0"],
                "img": [*reds, reds[0]],
                "category": ["dress", "shirt", "dress", "shirt", "toptee"],
            },
            "img",
        ),
    }
    for name, (columns, image) in tables.items():
        table = datasets.Dataset.from_dict(columns)
        table = table.cast_column(image, picture) if image else table
        (tmp_path / name).mkdir(parents=True)
        splits = ("val", "test") if name == "royokong/cirr_imgs" else ("test",) if name.endswith("_test") else ("val",)
        for split in splits:
            # the library knows a split by its file's name, and calls val "validation"
            table.to_parquet(tmp_path / name / f"{split}.parquet")

    def open_(repository: str, split: str, revision: str | None) -> tuple[read_hub.Table, str]:
        return read_hub.open_table(str(tmp_path / repository), {"val": "validation"}.get(split, split), revision)

    return open_


def test_hub_captions(hub: read_hub.Open) -> None:
    loaded = read_hub.FLICKR30K({}, hub)
    assert captions(loaded) == [(f"{i} {j}", (i,)) for i in range(2) for j in range(5)]
    assert isinstance(loaded.data, Captioned)
    assert [source.picture() for source in loaded.data.gallery] == [png("red"), png("green")]


def test_hub_cirr(hub: read_hub.Open) -> None:
    data = read_hub.CIRR({}, hub).data
    assert isinstance(data, Composed)
    [query] = data.queries
    assert (query.reference, query.target, query.texts, query.members) == (1, 2, ("make it blue",), ())
    assert data.gallery[1].picture() == png("green")
    data = read_hub.CIRR_TEST({}, hub).data
    assert isinstance(data, Composed)
    assert (data.queries[0].key, data.queries[0].target) == ("9", None)


def test_hub_fashioniq(hub: read_hub.Open) -> None:
    data = read_hub.FASHIONIQ({}, hub).data
    assert isinstance(data, dict)
    assert [source.name for source in data["dress"].gallery] == ["d0", "d1"]
    [query] = data["shirt"].queries
    assert (query.reference, query.target, query.texts) == (0, 1, ("is red", "is long"))
    assert data["shirt"].gallery[0].picture() == png("green")


def test_hub_out_of_reach(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets")
    with pytest.raises(DataError, match=r"could not be had from the hub .* or give a local copy with --data"):
        read_hub.open_table(str(tmp_path / "none"), "test")


@needs_shared
def test_real_annotations() -> None:
    flickr30k, coco = read_captioned.flickr30k(SHARED).data, read_captioned.coco(SHARED).data
    assert isinstance(flickr30k, Captioned)
    assert isinstance(coco, Captioned)
    assert (len(flickr30k.gallery), len(flickr30k.captions), flickr30k.gallery[0].name) == (1000, 5000, "1007129816.jpg")
    assert (len(coco.gallery), len(coco.captions), coco.gallery[0].name) == (5000, 25000, "COCO_val2014_000000391895.jpg")
    assert 1000 - len(absent(flickr30k.gallery)) == 243  # those that Flickr8k has
    assert 5000 - len(absent(coco.gallery)) == 6
    flickr8k, mini = read_captioned.flickr8k(SHARED).data, read_captioned.coco_mini(SHARED).data
    assert isinstance(flickr8k, Captioned)
    assert isinstance(mini, Captioned)
    assert (len(flickr8k.gallery), len(flickr8k.captions), len(absent(flickr8k.gallery))) == (1000, 5000, 0)
    assert (len(mini.gallery), len(mini.captions), len(absent(mini.gallery))) == (101, 505, 0)


@needs_shared
def test_real_sts() -> None:
    sizes = {"sts12": 3108, "sts13": 1500, "sts14": 3750, "sts15": 3000, "sts16": 1186, "stsb": 1379, "sickr": 4927}
    for folder, note in (("sts", "lower-cased"), ("sts_raw", "original case")):
        loaded = read_sts.sts(SHARED / folder)
        assert isinstance(loaded.data, Rating)
        assert {task: len(pairs) for task, pairs in loaded.data.tasks.items()} == sizes
        assert note in loaded.notes[0]


@needs_shared
def test_real_composed_annotations() -> None:
    val, test = read_composed.cirr(SHARED).data, read_composed.cirr(SHARED, "test1").data
    assert isinstance(val, Composed)
    assert isinstance(test, Composed)
    assert (len(val.queries), len(val.gallery), len(test.queries), len(test.gallery)) == (4181, 2297, 4148, 2315)
    assert {len(q.members) for q in (*val.queries, *test.queries)} == {5}
    assert all(q.target in q.members for q in val.queries)
    assert all(q.target is None for q in test.queries)
    fashion = read_composed.fashioniq(SHARED).data
    assert isinstance(fashion, dict)
    assert [(len(part.queries), len(part.gallery)) for part in fashion.values()] == [(2017, 3817), (2038, 6346), (1961, 5373)]
    assert all(len(q.texts) == 2 for part in fashion.values() for q in part.queries)
