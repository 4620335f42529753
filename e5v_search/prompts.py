"""Prompt sets as data: what is written around an input before the model reads it.

The strings are those of the paper's code (kongds/E5-V), misspellings and blanks included: they made its numbers.
A set has up to three prompts: `text` (`<sent>` stands for the sentence), `image` (`<image>` stands for the picture)
and `composed` (both). The chat wrapper belongs to the model, not to the prompt set.
"""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from e5v_search.errors import UsageError

IMAGE = "<image>"
SENTENCE = "<sent>"

LLAMA3_CHAT = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
MISTRAL_CHAT = "[INST] {} [/INST]"


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one task. `None`: the task has no such input."""

    name: str
    text: str | None = None
    image: str | None = None
    composed: str | None = None

    def get(self, kind: str) -> str:
        """The prompt for `kind` ("text", "image" or "composed"); UsageError when the set has none."""
        prompt: str | None = getattr(self, kind)
        if prompt is None:
            have = ", ".join(f.name for f in fields(self)[1:] if getattr(self, f.name))
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
    )


_RETRIEVAL = PromptSet("retrieval", text=_TEXT, image=_IMAGE)
_PROTOCOLS = (  # sets of the protocols that have their own
    PromptSet(
        "cirr",
        text=_TEXT,
        image="<image>\n Describe this image in one word:",
        composed='<image>Modify this image with "<sent>", desribe modified image in one word:',
    ),
    _fashioniq("dress", "dress"),
    _fashioniq("shirt", "shirt"),
    _fashioniq("toptee", "shirt"),  # the paper's code calls toptee "shirt" in its prompts
    PromptSet("sts", text=" <sent>\nSummary above sentence in one word:"),
)

_PLACEHOLDERS = {"text": (SENTENCE,), "image": (IMAGE,), "composed": (IMAGE, SENTENCE)}  # in the order of a bare input
_ABLATIONS = ("last", "prompt")
FORMS = (*_ABLATIONS, _RETRIEVAL.name)  # what Table 6 compares


def _ablated(whole: PromptSet, how: str, name: str) -> PromptSet:
    """What Table 6 compares a set with: "last", the bare input, and "prompt", the prompts without "in one word"."""
    kinds = (kind for kind in _PLACEHOLDERS if getattr(whole, kind))
    if how == "last":
        return PromptSet(name, **{kind: "".join(_PLACEHOLDERS[kind]) for kind in kinds})
    return PromptSet(name, **{kind: whole.get(kind).replace(" in one word", "") for kind in kinds})


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
    """A prompt set by name, or from a TOML file with `text`, `image` and `composed` strings.

    Names are those of `PROMPT_SETS`, and for each protocol with its own set that name with "-last" or "-prompt" behind.

    Raises UsageError naming every problem of the file at once.
    """
    known = PROMPT_SETS | _ABLATED
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"unknown prompt set {str(name)!r}; known: {', '.join(PROMPT_SETS)}, or a .toml file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"prompt set {path}: {error}") from error
    problems = [f"unknown key {key!r}" for key in data if key not in {"name", *_PLACEHOLDERS}]
    for kind, needed in _PLACEHOLDERS.items():
        if kind not in data:
            continue
        if not isinstance(data[kind], str):
            problems.append(f"{kind!r} must be a string")
        elif sorted(re.findall("<image>|<sent>", data[kind])) != sorted(needed):
            problems.append(f"{kind!r} must hold {' and '.join(sorted(needed))} once each")
    if not any(kind in data for kind in _PLACEHOLDERS):
        problems.append("give at least one of text, image, composed")
    if problems:
        raise UsageError(f"prompt set {path}: {'; '.join(problems)}")
    return PromptSet(str(data.get("name", path.stem)), **{k: data[k] for k in _PLACEHOLDERS if k in data})
