import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from e5v_search.backbones.registry import BUNDLED
from e5v_search.errors import UsageError
from e5v_search.prompts import LLAMA3_CHAT, PROMPT_SETS
from e5v_search.training.data import load_photos, read_captions, read_split, read_triplets, sts_sentences, tidy
from e5v_search.training.tokenizer import BOS, SPECIAL, train_tokenizer


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "number"),
    [("no tab here", 2), ("x.jpg\tno number", 2), ("x.jpg#0\t ", 2), ("x.jpg#zero\tcaption", 2)],
)
def test_a_bad_caption_line_is_named(tmp_path: Path, line: str, number: int) -> None:
    path = write(tmp_path / "tokens.txt", f"a.jpg#0\tA dog .\n{line}\n")
    with pytest.raises(UsageError, match=rf"tokens\.txt:{number}: .*{re.escape(line[:5])}"):
        read_captions(path)


def test_captions_are_grouped_by_photo_and_tidied(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens.txt", 'a.jpg#0\tA dog runs .\nb.jpg#0\tA cat , asleep\na.jpg#1\t" Two dogs "\n')
    assert read_captions(path) == {"a.jpg": ["A dog runs.", "Two dogs"], "b.jpg": ["A cat, asleep"]}
    assert tidy("what ? no !") == "what? no!"


def test_sentences_of_sts_b_that_are_held_out_or_caption_photos_are_left_out(tmp_path: Path) -> None:
    def rows(*rows: tuple[str, str, str]) -> str:
        return "".join(f"genre\t{file}\t2012\t7\t5.0\t{a}\t{b}\n" for file, a, b in rows)

    write(tmp_path / "sts-dev.csv", rows(("headlines", "Dev says so.", "x")))
    write(tmp_path / "sts-test.csv", rows(("headlines", "y", 'A "test".')))
    train = rows(("headlines", "One.", "Two."), ("images", "A photo.", "Of it."), ("MSRvid", "Two.", 'A "test".'))
    write(tmp_path / "sts-train.csv", train + rows(("MSRvid", "Dev says so.", "Three.")))
    assert sts_sentences(tmp_path) == ["One.", "Two.", "Three."]
    write(tmp_path / "sts-train.csv", f"{train}too\tfew\n")
    with pytest.raises(UsageError, match=r"sts-train\.csv:4: seven columns are needed, not 2"):
        sts_sentences(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", r":1: the header must be sent0,sent1,hard_neg, not 'a,b,c'"),
        ("", r":1: the header"),
        ("sent0,sent1,hard_neg\nx,y,z\nx,y\n", r":3: three sentences are needed"),
        ('sent0,sent1,hard_neg\n"two\nlines",y,z\nx, ,z\n', r":4: three sentences are needed"),
    ],
)
def test_a_bad_triplet_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_triplets(write(tmp_path / "nli.csv", text))


def test_triplets_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "nli.csv", 'sent0,sent1,hard_neg\n"a, b",c ,d\n')
    assert read_triplets(path) == [("a, b", "c", "d")]


@pytest.mark.parametrize(
    ("text", "message"),
    [("a.jpg\n\nb.jpg\n", ":2: "), ("../a.jpg\n", ":1: "), ("a.jpg\na.jpg\n", "twice")],
)
def test_a_bad_split_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_split(write(tmp_path / "split.txt", text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        read_split(tmp_path / "nowhere.txt")


def test_photos_are_decoded_to_one_size_and_a_broken_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "images" / "a.png")
    write(tmp_path / "Flickr_8k.trainImages.txt", "a.png\n")
    write(tmp_path / "Flickr8k.token.txt", "a.png#0\tred\n")
    photos = load_photos(tmp_path, "train", 16)
    assert photos.pixels.shape == (1, 3, 16, 16)
    assert np.array_equal(photos.pixels[0, :, 8, 8], [255, 0, 0])
    write(tmp_path / "images" / "b.png", "not a picture")
    write(tmp_path / "Flickr_8k.trainImages.txt", "a.png\nb.png\n")
    with pytest.raises(UsageError, match=r"no caption for b\.png"):
        load_photos(tmp_path, "train", 16)
    write(tmp_path / "Flickr8k.token.txt", "a.png#0\tred\nb.png#0\tblue\n")
    with pytest.raises(UsageError, match=r"b\.png"):
        load_photos(tmp_path, "train", 16)


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(["A dog runs on the grass.", "Two dogs on a beach", "a red kayak"] * 20, 600)


@pytest.fixture(scope="module", params=["small", "bundled"])
def tokenizer(request: pytest.FixtureRequest, small: Tokenizer) -> Tokenizer:
    return small if request.param == "small" else Tokenizer.from_file(str(BUNDLED / "e5v-tiny" / "tokenizer.json"))


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(small: Tokenizer, text: str) -> None:
    expected = unicodedata.normalize("NFKC", text).lower()
    if expected == "".join(c.lower() for c in unicodedata.normalize("NFKC", text)):  # no letter that needs its neighbours
        ids = small.encode(text, add_special_tokens=False).ids
        assert small.decode(ids, skip_special_tokens=False) == expected


def test_special_tokens_are_llama_3_s_and_come_last(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == list(range(size - len(SPECIAL), size))
    assert tokenizer.encode("a dog").tokens[0] == BOS
    wrapped = tokenizer.encode(LLAMA3_CHAT.format("<image>\n"))
    assert wrapped.tokens[:4] == [BOS, "<|start_header_id|>", "user", "<|end_header_id|>"]
    assert wrapped.tokens.count("<image>") == 1


@pytest.mark.parametrize("name", ["retrieval", "cirr", "sts"])
def test_prompts_cost_one_token_a_word(tokenizer: Tokenizer, name: str) -> None:
    for prompt in (PROMPT_SETS[name].text, PROMPT_SETS[name].image, PROMPT_SETS[name].composed):
        pieces = re.findall(r"<image>|<sent>|\w+|[^\w\s]+", prompt or "")
        if prompt:
            # <sent> is put in, a lone blank or a line end is a token of its own
            assert len(tokenizer.encode(prompt.replace("<sent>", ""), add_special_tokens=False)) <= len(pieces) + 2


def test_case_and_width_are_folded(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("A DOG").ids == tokenizer.encode("ａ dog").ids
