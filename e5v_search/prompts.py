"""Prompt sets as data: what is written around an input before the model reads it.

The strings are those of the paper's code (kongds/E5-V), misspellings and blanks included: they made its numbers.
A set has up to three prompts: `text` (`<sent>` stands for the sentence), `image` (`<image>` stands for the picture)
and `composed` (both). How they reach a model is the model's own: its `Wording` has the chat wrapper, and for a model that
was trained on other words than E5-V's, those; such a model takes from the set what it is to do, the instruction.
"""

import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from e5v_search.errors import UsageError

IMAGE = "<image>"
SENTENCE = "<sent>"

LLAMA3_CHAT = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
MISTRAL_CHAT = "[INST] {} [/INST]"
INSTRUCTION = "{instruction}"
INSTRUCTED = "instruction:"  # before a text of the user's: the name of a set that asks for just that
NAMED = "model:"  # before a name: the prompt that the model itself knows by it


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one task. `None`: the task has no such input.

    `instructions`, by kind, is what models are told that take an instruction. Models with words of their own do not read
    the prompts, unless they are `literal`: written for the model in question. `asked` is what the user asks of any input,
    `named` the name that a prompt has in the model itself.
    """

    name: str
    text: str | None = None
    image: str | None = None
    composed: str | None = None
    instructions: Mapping[str, str] = field(default_factory=dict)
    literal: bool = False
    asked: str | None = None
    named: str | None = None

    @property
    def of_the_user(self) -> bool:
        """Whether it is to have words read that no model would be told by itself."""
        return self.literal or self.asked is not None or self.named is not None

    def content(self, kind: str) -> str:
        """All of it that may change an embedding of `kind`, which a file's name does not say. See `get`."""
        return "\n".join(filter(None, (self.get(kind), self.instructions.get(kind), self.named)))

    def get(self, kind: str) -> str:
        """The prompt for `kind` ("text", "image" or "composed"); UsageError when the set has none."""
        prompt: str | None = getattr(self, kind)
        if prompt is None:
            have = ", ".join(name for name in _PLACEHOLDERS if getattr(self, name))
            raise UsageError(f"prompt set {self.name!r} has no {kind} prompt (it has: {have}); choose another with --prompts")
        return prompt


_TEXT = "<sent>\nSummary above sentence in one word: "
_IMAGE = "<image>\nSummary above image in one word: "


def _fashioniq(category: str, word: str) -> PromptSet:
    return PromptSet(
        f"fashioniq-{category}",
        text=_TEXT,
        image=f"<image>\n Describe this {word} in one word based on its style:",
        composed=f"<image> change the style of this {word} to <sent>\n "
        f"Desribe this modified {word} in one word based on its style:",
        instructions={"composed": "Find an image to match the fashion image and style note"},
    )


_RETRIEVAL = PromptSet("retrieval", text=_TEXT, image=_IMAGE)
_PROTOCOLS = (  # sets of the protocols that have their own
    PromptSet(
        "cirr",
        text=_TEXT,
        image="<image>\n Describe this image in one word:",
        composed='<image>Modify this image with "<sent>", desribe modified image in one word:',
        instructions={"composed": "Given an image, find a similar everyday image with the described changes"},
    ),
    _fashioniq("dress", "dress"),
    _fashioniq("shirt", "shirt"),
    _fashioniq("toptee", "shirt"),  # the paper's code calls toptee "shirt" in its prompts
    PromptSet(
        "sts",
        text=" <sent>\nSummary above sentence in one word:",
        instructions={"text": "Retrieve semantically similar text"},
    ),
)

_PLACEHOLDERS = {"text": (SENTENCE,), "image": (IMAGE,), "composed": (IMAGE, SENTENCE)}  # in the order of a bare input
_ABLATIONS = ("last", "prompt")
FORMS = (*_ABLATIONS, _RETRIEVAL.name)  # what Table 6 compares


def _ablated(whole: PromptSet, how: str, name: str) -> PromptSet:
    """What Table 6 compares a set with: "last", the bare input, and "prompt", the prompts without "in one word"."""
    kinds = (kind for kind in _PLACEHOLDERS if getattr(whole, kind))
    if how == "last":
        return _of(name, {kind: "".join(_PLACEHOLDERS[kind]) for kind in kinds}, whole.instructions)
    return _of(name, {kind: whole.get(kind).replace(" in one word", "") for kind in kinds}, whole.instructions)


def _instructed(name: str, instruction: str) -> PromptSet:
    """What the user asks of any input, in the user's words (the paper's section 5.3)."""
    prompts = {kind: "\n".join((*parts, instruction)) for kind, parts in _PLACEHOLDERS.items()}
    return replace(_of(name, prompts, dict.fromkeys(prompts, instruction)), asked=instruction)


def _of(name: str, prompts: Mapping[str, str], told: Mapping[str, str], literal: bool = False) -> PromptSet:
    return PromptSet(name, prompts.get("text"), prompts.get("image"), prompts.get("composed"), told, literal)


PROMPT_SETS: dict[str, PromptSet] = {
    p.name: p for p in (_RETRIEVAL, *_PROTOCOLS, *(_ablated(_RETRIEVAL, how, how) for how in _ABLATIONS))
}
_ABLATED = {name: _ablated(p, how, name) for p in _PROTOCOLS for how in _ABLATIONS for name in [f"{p.name}-{how}"]}


def own_set(asked: str | None, own: str) -> str:
    """The set for a task whose own set is `own`, when `asked` was asked for.

    Of `FORMS`, "last" and "prompt" are the ablations of the task's own set and "retrieval" is that set, as None is:
    Table 6 compares them on every task, each time in that task's words. Any other set is taken as it is.
    """
    if asked is None or asked == _RETRIEVAL.name:
        return own
    return f"{own}-{asked}" if asked in FORMS and own != _RETRIEVAL.name else asked


def load_prompts(name: str | Path) -> PromptSet:
    """A prompt set by name, or from a TOML file with `text`, `image`, `composed` and `instruction` strings.

    Names are those of `PROMPT_SETS`, for each protocol with its own set that name with "-last" or "-prompt" behind,
    `INSTRUCTED` with a text behind, as in "instruction:What is the weather, in one word:", and `NAMED` with the name of a
    prompt of the model's own behind, as in "model:query".

    Raises UsageError naming every problem of the file at once.
    """
    known = PROMPT_SETS | _ABLATED
    if str(name) in known:
        return known[str(name)]
    if str(name).startswith(INSTRUCTED):
        instruction = str(name).removeprefix(INSTRUCTED).strip()
        if problem := _bad_instruction(instruction):
            raise UsageError(f"the instruction {instruction!r} {problem}")
        return _instructed(f"{INSTRUCTED}{instruction}", instruction)
    if str(name).startswith(NAMED):
        named = str(name).removeprefix(NAMED)
        return replace(_of(str(name), {kind: "".join(parts) for kind, parts in _PLACEHOLDERS.items()}, {}), named=named)
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"unknown prompt set {str(name)!r}; known: {', '.join(PROMPT_SETS)}, or a .toml file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"prompt set {path}: {error}") from error
    problems = [f"unknown key {key!r}" for key in data if key not in {"name", "instruction", *_PLACEHOLDERS}]
    for kind, needed in _PLACEHOLDERS.items():
        if kind not in data:
            continue
        if not isinstance(data[kind], str):
            problems.append(f"{kind!r} must be a string")
        elif _marks(data[kind]) != sorted(needed):
            problems.append(f"{kind!r} must hold {' and '.join(sorted(needed))} once each")
    told: Any = data.get("instruction")
    if told is not None and (problem := _bad_instruction(told)):
        problems.append(f"'instruction' {problem}")
    prompts = {kind: data[kind] for kind in _PLACEHOLDERS if kind in data}
    if not prompts and told is None:
        problems.append("give at least one of text, image, composed, or an instruction")
    if problems:
        raise UsageError(f"prompt set {path}: {'; '.join(problems)}")
    own = str(data.get("name", path.stem))
    if not prompts:
        return _instructed(own, told)
    return _of(own, prompts, {} if told is None else dict.fromkeys(prompts, told), literal=True)


def _marks(prompt: str) -> list[str]:
    return sorted(re.findall("<image>|<sent>", prompt))


def _bad_instruction(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return "must be a text"
    if any(mark in value for mark in (IMAGE, SENTENCE, INSTRUCTION)):
        return f"may hold none of {IMAGE}, {SENTENCE}, {INSTRUCTION}; a prompt set of your own may (--prompts FILE.toml)"
    return None


@dataclass(frozen=True)
class Wording:
    """How a model is spoken to.

    chat: what stands around a prompt, which goes where `{}` is; `picture` is what stands in a text for a picture.
    text, image, composed: the prompts of a model that was not trained on E5-V's. `{instruction}`, in them or in `chat`, is
    what a prompt set tells this kind of input, or else `instructions`, by kind.
    """

    chat: str = "{}"
    picture: str = IMAGE
    text: str | None = None
    image: str | None = None
    composed: str | None = None
    instructions: dict[str, str] = field(default_factory=dict)

    def problems(self) -> list[str]:
        out = [] if self.chat.count("{}") == 1 else ["chat: {} is needed once, where the prompt goes"]
        for kind, needed in _PLACEHOLDERS.items():
            own: str | None = getattr(self, kind)
            if own is not None and _marks(own) != sorted(needed):
                out.append(f"{kind}: {' and '.join(sorted(needed))} once each are needed")
        return out + [f"instructions.{kind}: no kind of input" for kind in self.instructions if kind not in _PLACEHOLDERS]

    def template(self, kind: str, prompts: str) -> str:
        """All that a model reads for `kind` under a prompt set, `<sent>` and `picture` in it. Raises UsageError."""
        chosen = load_prompts(prompts)
        if chosen.named is not None:
            raise UsageError(f"--prompts {prompts}: prompts by a model's own names are for models of sentence-transformers")
        prompt = chosen.get(kind)
        if not chosen.literal:
            prompt = getattr(self, kind) or prompt
        told = chosen.instructions.get(kind, self.instructions.get(kind, ""))
        if told and not unicodedata.category(told[-1]).startswith("P"):
            told += ":" if SENTENCE in prompt and INSTRUCTION in prompt else "."
        whole = self.chat.replace("{}", prompt).replace(IMAGE, self.picture)
        return whole.replace(INSTRUCTION, told) if told else re.sub(r"\{instruction\}[ \n]?", "", whole)


_SYSTEM = "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
_BARE = {kind: "".join(parts) for kind, parts in _PLACEHOLDERS.items()}
_ASSISTANT = dict.fromkeys(_PLACEHOLDERS, "You are a helpful assistant.")
_WITH_QUESTION = "Represent the given image with the following question"
_VLM2VEC = Wording(
    text="{instruction} <sent>",
    image="<image>\n{instruction}",
    composed="<image>\n{instruction} <sent>",
    instructions={"image": "Represent the given image", "composed": _WITH_QUESTION},
)

WORDINGS: dict[str, Wording] = {
    "llama3": Wording(LLAMA3_CHAT),
    "mistral": Wording(MISTRAL_CHAT),
    "phi3": Wording("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|image_1|>"),
    "llava-onevision": Wording("<|im_start|>user {}<|im_end|><|im_start|>assistant\n"),
    "qwen2-vl": Wording(_SYSTEM, _QWEN_PICTURE, instructions=_ASSISTANT),
    "gme": Wording(f"{_SYSTEM}<|endoftext|>", _QWEN_PICTURE, **_BARE, instructions=_ASSISTANT),
    "qwen3-vl-embedding": Wording(
        _SYSTEM, _QWEN_PICTURE, **_BARE, instructions=dict.fromkeys(_PLACEHOLDERS, "Represent the user's input.")
    ),
    "vlm2vec": replace(_VLM2VEC, picture="<|image_1|>"),
    "vlm2vec-v2": replace(_VLM2VEC, picture="<|image_pad|>"),
    "unime-v2": replace(
        _VLM2VEC,
        image="<image> {instruction}",
        composed="<image> {instruction} <sent>",
        instructions={"image": "Find an image caption describing the given image", "composed": _WITH_QUESTION},
    ),
    "none": Wording(),
}
