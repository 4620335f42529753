"""Prompts to token ids."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from e5v_search.backbones import checkpoint
from e5v_search.errors import IncompleteCheckpoint
from e5v_search.prompts import IMAGE, SENTENCE, Wording


class PromptEncoder:
    """Prompt strings to token ids: the chat wrapper, the one image token, and text that cannot escape its place."""

    def __init__(
        self, tokenizer: Tokenizer, wording: Wording, max_tokens: int, image: str = IMAGE, bos: str | None = None
    ) -> None:
        """image: the token that stands for a picture; bos: a first token that the tokenizer may leave out."""
        self.tokenizer, self.wording, self.max_tokens = tokenizer, wording, max_tokens
        self.tokenizer.add_special_tokens([AddedToken(image, special=True, normalized=False)])  # no change where it is
        self.image_id = self.id(image)
        specials = (t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special)
        self.specials = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self.specials)))
        added = bos is None or tokenizer.encode("a").ids[:1] == [self.id(bos)]
        self._bos = [] if bos is None or added else [self.id(bos)]

    @classmethod
    def read(cls, folder: Path, wording: Wording, max_tokens: int, image: str = IMAGE) -> "PromptEncoder":
        """Of a checkpoint folder."""
        settings = tokenizer_settings(folder)
        # LLaMA-3's tokenizer.json adds the first token itself; some Mistral files leave it to the library
        bos = named(settings, "bos_token") if settings.get("add_bos_token") else None
        return cls(load_tokenizer(folder), wording, max_tokens, image, bos)

    def id(self, token: str) -> int:
        """Of a special token. IncompleteCheckpoint when the tokenizer has none such."""
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise IncompleteCheckpoint(f"the tokenizer does not know {token!r}; download the model again")
        return token_id

    def ask(self, kind: str, prompts: str, texts: Sequence[str] = ("",)) -> list[list[int]]:
        """Ids of what the model reads for `kind` ("text", "image" or "composed") under a prompt set, once for each text.

        Special tokens that a user writes ("<image>", "<|eot_id|>") are broken by a blank and read as plain text.
        Raises UsageError.
        """
        return self.fill(self.wording.template(kind, prompts), texts)

    def encode(self, prompt: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of `prompt` in the chat wrapper, once for each text. See `ask`."""
        return self.fill(self.wording.chat.replace("{}", prompt), texts)

    def fill(self, template: str, texts: Sequence[str]) -> list[list[int]]:
        """Ids of `template` as it stands, once for each text. See `ask`."""
        safe = [self._special.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) for text in texts]
        filled = [template.replace(SENTENCE, text) for text in safe]
        return [self._bos + encoding.ids for encoding in self.tokenizer.encode_batch(filled)]

    def around_image(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Ids before and behind the image id, which is never looked up: in one published revision it lies outside the
        embedding table."""
        at = ids.index(self.image_id)
        return ids[:at], ids[at + 1 :]


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return checkpoint.read_json(path) if path.exists() else {}


def named(settings: Mapping[str, Any], token: str) -> str | None:
    """The special token that a tokenizer's settings call "bos_token", "pad_token", …: a string, in old files an object."""
    value = settings.get(token)
    content: str | None = value.get("content") if isinstance(value, dict) else value
    return content


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise IncompleteCheckpoint(f"{path} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    if not (folder / "tokenizer.model").exists():
        raise IncompleteCheckpoint(f"{folder} has no tokenizer.json: not a whole model folder")
    from transformers import AutoTokenizer  # slow to import, so only for folders with a sentencepiece file alone

    converted: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    return converted
