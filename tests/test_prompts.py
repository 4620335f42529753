from pathlib import Path

import pytest

from e5v_search.errors import UsageError
from e5v_search.prompts import LLAMA3_CHAT, PROMPT_SETS, WORDINGS, load_prompts, own_set


def test_the_papers_strings_to_the_letter() -> None:
    assert LLAMA3_CHAT == (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
    )
    assert PROMPT_SETS["retrieval"].text == "<sent>\nSummary above sentence in one word: "
    assert PROMPT_SETS["retrieval"].image == "<image>\nSummary above image in one word: "
    assert PROMPT_SETS["cirr"].image == "<image>\n Describe this image in one word:"
    assert PROMPT_SETS["cirr"].composed == '<image>Modify this image with "<sent>", desribe modified image in one word:'
    assert PROMPT_SETS["sts"].text == " <sent>\nSummary above sentence in one word:"
    assert PROMPT_SETS["last"].text == "<sent>"
    for category, word in (("dress", "dress"), ("shirt", "shirt"), ("toptee", "shirt")):
        fashion = PROMPT_SETS[f"fashioniq-{category}"]
        assert fashion.image == f"<image>\n Describe this {word} in one word based on its style:"
        assert fashion.composed == (
            f"<image> change the style of this {word} to <sent>\n Desribe this modified {word} in one word based on its style:"
        )


def test_names_of_design_are_all_there() -> None:
    assert set(PROMPT_SETS) == {
        "retrieval", "cirr", "fashioniq-dress", "fashioniq-shirt", "fashioniq-toptee", "sts", "last", "prompt",
    }  # fmt: skip


# Table 6's "Last" and "Prompt", written out for each protocol: (text, image, composed)
ABLATIONS: dict[str, tuple[str | None, str | None, str | None]] = {
    "last": ("<sent>", "<image>", None),
    "prompt": ("<sent>\nSummary above sentence: ", "<image>\nSummary above image: ", None),
    "cirr-last": ("<sent>", "<image>", "<image><sent>"),
    "cirr-prompt": (
        "<sent>\nSummary above sentence: ",
        "<image>\n Describe this image:",
        '<image>Modify this image with "<sent>", desribe modified image:',
    ),
    "fashioniq-dress-last": ("<sent>", "<image>", "<image><sent>"),
    "fashioniq-dress-prompt": (
        "<sent>\nSummary above sentence: ",
        "<image>\n Describe this dress based on its style:",
        "<image> change the style of this dress to <sent>\n Desribe this modified dress based on its style:",
    ),
    "fashioniq-toptee-prompt": (
        "<sent>\nSummary above sentence: ",
        "<image>\n Describe this shirt based on its style:",
        "<image> change the style of this shirt to <sent>\n Desribe this modified shirt based on its style:",
    ),
    "sts-last": ("<sent>", None, None),
    "sts-prompt": (" <sent>\nSummary above sentence:", None, None),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_to_the_letter(name: str) -> None:
    prompts = load_prompts(name)
    assert (prompts.name, prompts.text, prompts.image, prompts.composed) == (name, *ABLATIONS[name])


@pytest.mark.parametrize(
    ("asked", "own", "taken"),
    [
        (None, "retrieval", "retrieval"),
        ("last", "retrieval", "last"),
        ("prompt", "retrieval", "prompt"),
        ("retrieval", "retrieval", "retrieval"),
        (None, "cirr", "cirr"),
        ("last", "cirr", "cirr-last"),
        ("prompt", "fashioniq-dress", "fashioniq-dress-prompt"),
        ("retrieval", "sts", "sts"),
        ("cirr", "fashioniq-dress", "cirr"),
        ("cirr-last", "fashioniq-dress", "cirr-last"),
        ("mine.toml", "sts", "mine.toml"),
    ],
)
def test_what_is_asked_for_in_a_tasks_own_words(asked: str | None, own: str, taken: str) -> None:
    assert own_set(asked, own) == taken


def test_missing_prompt_says_what_the_set_has() -> None:
    with pytest.raises(UsageError, match=r"'retrieval' has no composed prompt \(it has: text, image\)"):
        PROMPT_SETS["retrieval"].get("composed")


def test_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('text = "<sent> in a word:"\nimage = "<image> in a word:"\n')
    prompts = load_prompts(path)
    assert (prompts.name, prompts.text, prompts.composed) == ("mine", "<sent> in a word:", None)


def test_every_problem_of_a_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('text = "no place"\nimage = 3\ncomposed = "<image><image> <sent>"\npicture = "x"\n')
    with pytest.raises(UsageError) as error:
        load_prompts(path)
    for part in (
        "unknown key 'picture'",
        "'text' must hold <sent>",
        "'image' must be a string",
        "'composed' must hold <image> and <sent>",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["nonsense", "nowhere.toml", "retrieval-last", "last-prompt"])
def test_unknown_set(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        load_prompts(name)


# what the user asks, and how models are spoken to


def test_an_instruction_is_a_set_of_its_own() -> None:
    prompts = load_prompts("instruction: What is the weather, in one word: ")
    assert prompts.text == "<sent>\nWhat is the weather, in one word:"
    assert prompts.image == "<image>\nWhat is the weather, in one word:"
    assert prompts.composed == "<image>\n<sent>\nWhat is the weather, in one word:"
    told = WORDINGS["llama3"].template("image", "instruction:What is it:")
    assert told == LLAMA3_CHAT.replace("{}", "<image>\nWhat is it:")


@pytest.mark.parametrize("text", ["", "  ", "what is <image>", "like <sent>", "{instruction}"])
def test_a_bad_instruction_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="instruction"):
        load_prompts(f"instruction:{text}")


def test_a_file_may_hold_an_instruction_alone_or_with_prompts(tmp_path: Path) -> None:
    path = tmp_path / "weather.toml"
    path.write_text('instruction = "What is the weather"\n')
    assert load_prompts(path).text == "<sent>\nWhat is the weather"
    gme = WORDINGS["gme"]
    assert gme.template("text", str(path)) == gme.template("text", "instruction:What is the weather")
    path.write_text('instruction = "What is the weather"\ntext = "Look: <sent>"\n')
    assert load_prompts(path).get("text") == "Look: <sent>"
    assert gme.template("text", str(path)).count("What is the weather.<|im_end|>") == 1
    assert "user\nLook: <sent><|im_end|>" in gme.template("text", str(path))
    path.write_text("instruction = 3\n")
    with pytest.raises(UsageError, match="'instruction' must be a text"):
        load_prompts(path)


QWEN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LOOK = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("wording", "kind", "prompts", "told"),
    [
        ("mistral", "text", "retrieval", "[INST] <sent>\nSummary above sentence in one word:  [/INST]"),
        ("phi3", "image", "retrieval", "<|user|>\n<|image_1|>\nSummary above image in one word: <|end|>\n<|assistant|>\n"),
        ("qwen3-vl-embedding", "text", "retrieval", QWEN.format("Represent the user's input.", "<sent>")),
        ("qwen3-vl-embedding", "image", "retrieval", QWEN.format("Represent the user's input.", LOOK)),
        ("qwen3-vl-embedding", "text", "sts", QWEN.format("Retrieve semantically similar text.", "<sent>")),
        ("gme", "image", "cirr", QWEN.format("You are a helpful assistant.", LOOK) + "<|endoftext|>"),
        (
            "gme",
            "composed",
            "cirr",
            QWEN.format("Given an image, find a similar everyday image with the described changes.", f"{LOOK}<sent>")
            + "<|endoftext|>",
        ),
        ("gme", "text", "instruction:Find a cat!", QWEN.format("Find a cat!", "<sent>") + "<|endoftext|>"),
        ("vlm2vec-v2", "text", "retrieval", "<sent>"),
        ("vlm2vec-v2", "image", "retrieval", "<|image_pad|>\nRepresent the given image."),
        (
            "vlm2vec-v2",
            "composed",
            "fashioniq-dress",
            "<|image_pad|>\nFind an image to match the fashion image and style note: <sent>",
        ),
    ],
)
def test_what_a_model_reads(wording: str, kind: str, prompts: str, told: str) -> None:
    assert WORDINGS[wording].template(kind, prompts) == told


@pytest.mark.parametrize("name", WORDINGS)
def test_every_wording_is_whole(name: str) -> None:
    wording = WORDINGS[name]
    assert not wording.problems()
    for kind, parts in {"text": 0, "image": 1, "composed": 1}.items():
        template = wording.template(kind, "cirr")
        assert template.count(wording.picture) == parts
        assert template.count("<sent>") == (kind != "image")
        assert "{" not in template
