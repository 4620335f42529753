import json
import re
from collections import Counter
from pathlib import Path

import pictures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from e5v_search.backbones.tiles import TileSpec
from e5v_search.config import parse
from e5v_search.errors import DataError, E5VError
from e5v_search.training.data import shuffled
from e5v_search.training.draws import Draws
from e5v_search.training.examples import Example, Input, read_examples, sentences
from e5v_search.training.tuning import Examples

SPEC = TileSpec(32, 16, ((32, 64), (64, 32)))


def examples(folder: Path, kind: str, file: str, **more: object) -> list[Example]:
    return read_examples(parse(Examples, {"kind": kind, "file": file} | more, "x"), folder)


def test_triplets_keep_their_lines(tmp_path: Path) -> None:
    (tmp_path / "nli.csv").write_text('sent0,sent1,hard_neg\n"a\nb",c,d\ne,f,g\n')
    found = examples(tmp_path, "triplets", "nli.csv")
    assert found == [
        Example(3, Input("a\nb"), (Input("c"),), (Input("d"),)),
        Example(4, Input("e"), (Input("f"),), (Input("g"),)),
    ]
    assert examples(tmp_path, "triplets", "nli.csv", limit=1) == found[:1]


def test_sentences_are_the_different_texts(tmp_path: Path) -> None:
    (tmp_path / "nli.csv").write_text("sent0,sent1,hard_neg\na,b,c\nb,d,a\n")
    found = sentences(examples(tmp_path, "triplets", "nli.csv"))
    assert [(e.row, e.query.text) for e in found] == [(2, "a"), (2, "b"), (2, "c"), (3, "d")]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("c.csv", 'file,caption\na.jpg,"A dog , asleep ."\nb.jpg,a cat\na.jpg,two\n'),
        ("c.txt", "a.jpg#0\tA dog , asleep .\nb.jpg#0\ta cat\na.jpg#1\ttwo\n"),
        ("c.jsonl", '{"file": "a.jpg", "captions": ["A dog , asleep .", "two"]}\n{"file": "b.jpg", "text": "a cat"}\n'),
        (
            "c.json",
            json.dumps(
                {
                    "images": [
                        {"split": "train", "filename": "a.jpg", "sentences": [{"raw": "A dog , asleep ."}, {"raw": "two"}]},
                        {"split": "restval", "filename": "b.jpg", "sentences": [{"raw": "a cat"}]},
                        {"split": "test", "filename": "c.jpg", "sentences": [{"raw": "never"}]},
                    ]
                }
            ),
        ),
    ],
)
def test_captions_are_gathered_by_picture(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    found = examples(tmp_path, "captions", file, pictures="img")
    assert {e.query.image: [p.text for p in e.positives] for e in found} == {
        tmp_path / "img/a.jpg": ["A dog, asleep.", "two"],
        tmp_path / "img/b.jpg": ["a cat"],
    }
    assert found[0].query.kind == "image"


def test_a_split_chooses_pictures(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a.jpg#0\tone\nb.jpg#0\ttwo\n")
    (tmp_path / "train.txt").write_text("b.jpg\n")
    [only] = examples(tmp_path, "captions", "c.txt", split="train.txt")
    assert only.query.image == tmp_path / "b.jpg"
    assert only.row == 2
    (tmp_path / "train.txt").write_text("b.jpg\nx.jpg\n")
    with pytest.raises(DataError, match=r"c\.txt has no captions of x\.jpg \(1 such"):
        examples(tmp_path, "captions", "c.txt", split="train.txt")
    (tmp_path / "c.json").write_text('{"images": [{"split": "val", "filename": "v.jpg", "sentences": [{"raw": "v"}]}]}')
    [only] = examples(tmp_path, "captions", "c.json", split="val")
    assert only.query.image == tmp_path / "v.jpg"


def test_instructions_are_of_any_modality(tmp_path: Path) -> None:
    rows = [
        {"query": "a dog", "positive": {"image": "a.jpg"}, "negatives": ["x", {"text": "y", "image": "b.jpg"}]},
        {"instruction": "What is it?", "query": {"image": "a.jpg"}, "positive": "a dog", "negatives": ["z"]},
        {"instruction": "Find it.", "query": "dog", "positive": {"text": "dog"}, "negatives": ["z"]},
    ]
    (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second, third = examples(tmp_path, "instructions", "i.jsonl")
    assert (first.query.kind, first.positives[0].kind) == ("text", "image")
    assert [n.kind for n in first.negatives] == ["text", "composed"]
    assert second.query == Input("What is it?", tmp_path / "a.jpg")
    assert third.query == Input("Find it.\ndog")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("triplets", "sent0,sent1,hard_neg\na,b,c\na,b\n", r"file\.jsonl:3: three sentences"),
        ("captions", '{"file": "a.jpg", "text": "x"}\n{"file": "a.jpg"}\n', r"file\.jsonl:2: a row needs a file"),
        ("instructions", "\n{]\n", r"file\.jsonl:2: not JSON"),
        ("instructions", '{"query": "a", "positive": "b", "negatives": []}\n', r":1: negatives must be a list of 1 or more"),
        ("instructions", '{"query": "a", "positive": "b", "negatives": [" "]}\n', r":1: each of the negatives must be a text"),
        ("instructions", '{"query": {"picture": "a"}, "positive": "b"}\n', r":1: query must be a text, or an object"),
        ("instructions", '{"query": "a", "positive": 3, "negatives": ["c"]}\n', r":1: positive must be a text"),
        ("instructions", '{"query": "a", "positive": "c", "instruction": 3, "negatives": ["c"]}\n', r":1: an instruction"),
        ("instructions", "", "holds no examples"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, kind: str, text: str, message: str) -> None:
    (tmp_path / "file.jsonl").write_text(text)
    with pytest.raises(E5VError, match=message):
        examples(tmp_path, kind, "file.jsonl")


def test_what_is_not_there_or_not_as_karpathys_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv is not there; --data"):
        examples(tmp_path, "triplets", "nowhere.csv")
    (tmp_path / "c.json").write_text('{"images": [{"split": "test"}, {"split": "train"}]}')
    with pytest.raises(DataError, match=r"c\.json: record 2 is not in the layout of Karpathy's files: KeyError 'filename'"):
        examples(tmp_path, "captions", "c.json")


@given(st.integers(1, 30), st.integers(0, 60), st.integers(0, 40))
def test_every_epoch_has_each_item_once(total: int, first: int, n: int) -> None:
    whole = shuffled("s", total, 0, (first + n) // total * total + total)
    assert shuffled("s", total, first, first + n) == whole[first : first + n]
    for i in range(0, len(whole), total):
        assert sorted(whole[i : i + total]) == list(range(total))


def texts(n: int, negatives: int = 3) -> list[Example]:
    return [
        Example(i, Input(f"q{i}"), (Input(f"p{i}"),), tuple(Input(f"n{i}-{j}") for j in range(negatives))) for i in range(n)
    ]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_processes_share_a_batch_without_overlap(processes: int, each: int, negatives: int) -> None:
    batch = processes * each
    for step in (0, 5):
        whole = Draws(texts(12), batch, negatives, seed=1).make(step)
        parts = [Draws(texts(12), batch, negatives, 1, None, (rank, processes)).make(step) for rank in range(processes)]
        for of in ("queries", "positives", "negatives"):
            there = [part.inputs[i] for part in parts for i in getattr(part, of)]
            assert there == [whole.inputs[i] for i in getattr(whole, of)]
        assert [row for part in parts for row in part.rows] == whole.rows
        assert len(whole.negatives) == batch * negatives
        for at, q in enumerate(whole.queries):
            number = whole.inputs[q].text[1:]  # type: ignore[index]
            assert whole.inputs[whole.positives[at]].text == f"p{number}"
            own = [whole.inputs[i].text for i in whole.negatives[at * negatives : (at + 1) * negatives]]
            assert len(set(own)) == negatives
            assert all(text.startswith(f"n{number}-") for text in own)  # type: ignore[union-attr]


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    forwards, backwards = Draws(texts(9), 4, 1, seed=3), Draws(texts(9), 4, 1, seed=3)
    assert [forwards.make(i) for i in range(5)] == [backwards.make(i) for i in (4, 3, 2, 1, 0)][::-1]
    assert forwards.make(0) != Draws(texts(9), 4, 1, seed=4).make(0)


def test_what_occurs_twice_is_embedded_once() -> None:
    same = [Example(i, Input("q"), (Input("p"),), (Input("q"),)) for i in range(5)]
    draw = Draws(same, 5, 1, seed=0).make(0)
    assert draw.inputs == [Input("q"), Input("p")]
    assert (draw.queries, draw.positives, draw.negatives) == ([0] * 5, [1] * 5, [0] * 5)


def test_a_picture_that_cannot_be_used_is_replaced_and_counted(tmp_path: Path) -> None:
    for i in range(4):
        pictures.photo(40, 30, seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"no picture")
    (tmp_path / "3.jpg").unlink()
    found = [Example(i + 1, Input(image=tmp_path / f"{i}.jpg"), (Input(f"{i}"),)) for i in range(4)]
    draws, again = Draws(found, 4, 0, 0, SPEC), Draws(found, 4, 0, 0, SPEC)
    for step in (0, 1):
        draw = draws.make(step)
        assert len(draw.queries) == len(draw.positives) == 4
        for q, p in zip(draw.queries, draw.positives, strict=True):
            assert f"{draw.inputs[p].text}.jpg" == draw.inputs[q].image.name  # type: ignore[union-attr]
        assert set(Counter(draw.rows)) == {1, 3}
        assert draw.rows == again.make(step).rows
        assert {path.name for path in draw.tiles} == {"0.jpg", "2.jpg"}
    assert {path.name for path in draws.skipped} == {"1.jpg", "3.jpg"}
    assert all(re.search(r"\d\.jpg", reason) for reason in draws.skipped.values())


def test_pictures_that_are_all_unusable_end_the_run_with_a_reason(tmp_path: Path) -> None:
    found = [Example(1, Input(image=tmp_path / "x.jpg"), (Input("x"),))]
    with pytest.raises(DataError, match=r"have pictures that cannot be used, one of them .*x\.jpg: "):
        Draws(found, 1, 0, 0, SPEC).make(0)
