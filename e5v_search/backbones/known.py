"""The models that can be named: declarations in TOML, ours beside this file and the user's own."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from e5v_search.config import ModelChoice, data_home, parse
from e5v_search.errors import UsageError
from e5v_search.prompts import PROMPT_SETS, WORDINGS, Wording

W = TypeVar("W")

OURS = Path(__file__).parent / "models.toml"
OWN_FILE = "E5V_MODELS"  # the environment variable that says where the user's own models stand


class Family(NamedTuple):
    module: str  # of this package; loaded with the first model of the family
    embedder: str
    what: str
    pooling: str
    takes: tuple[str, ...] = ()  # of what not every family does


_DECODER = ("4bit", "8bit", "adapter", "instruction")

SENTENCE_TRANSFORMERS = "sentence_transformers"

# by the model_type of a config.json, but for the last
FAMILIES = {
    "llava_next": Family(
        "llava_next", "LlavaNextEmbedder", "E5-V, LLaVA-1.6", "last token", (*_DECODER, "int8", "fp8", "tiles")
    ),
    "qwen2_vl": Family("qwen_vl", "Qwen2VL", "Qwen2-VL: GME, VLM2Vec-V2", "last token", _DECODER),
    "qwen3_vl": Family("qwen_vl", "Qwen3VL", "Qwen3-VL: Qwen3-VL-Embedding", "last token", _DECODER),
    "llava_onevision": Family("llava_onevision", "LlavaOnevision", "LLaVA-OneVision: UniME, UniME-V2", "last token", _DECODER),
    "phi3_v": Family("phi3_v", "Phi3V", "Phi-3-vision: UniME, VLM2Vec", "last token", _DECODER),
    "clip": Family("two_towers", "TwoTowers", "CLIP", "the towers' own"),
    "siglip": Family("two_towers", "TwoTowers", "SigLIP, SigLIP 2 of fixed resolution", "the towers' own"),
    SENTENCE_TRANSFORMERS: Family(
        "sentence_transformer",
        "SentenceTransformerEmbedder",
        "any other model that sentence-transformers loads, with a modules.json",
        "the model's own",
        ("instruction",),
    ),
}


def check(family: str, choice: ModelChoice) -> None:
    """UsageError for a choice that models of `family` cannot follow; it names the families that can."""
    if choice.tiles != "auto":
        check_takes(family, "tiles", "--tiles", choice.name)
    if choice.quantize is not None:
        check_takes(family, choice.quantize, f"--quantize {choice.quantize}", choice.name)
    if choice.adapter is not None:
        check_takes(family, "adapter", "--adapter", choice.name)


def check_takes(family: str, what: str, option: str, name: str) -> None:
    """UsageError when `what`, one of the things that `Family.takes` lists, is not for the model `name` of `family`."""
    if what not in FAMILIES[family].takes:
        able = ", ".join(key for key, each in FAMILIES.items() if what in each.takes)
        raise UsageError(f"{name} is a {family} model; {option} is for {able}: leave {option.partition(' ')[0]} out")


@dataclass(frozen=True)
class Known:
    """A declared model. `origin` is the user's file, None for ours.

    hub: where it is, a hub id or a folder, if not at its own name; revision: the commit that is meant.
    adapter: merged into it, as `--adapter` takes it. wording: how it is spoken to, by name, or `words`, in full; else as its
    family is. prompts: the sets that it was made or published with. least_dim: `--dim` takes any number from this to `dim`.
    min_pixels, max_pixels: of a picture, for models that take pictures at their own size.
    memory_16bit, memory_4bit: GiB for the weights alone.
    """

    name: str
    summary: str
    family: str
    dim: int
    licence: str
    hub: str | None = None
    revision: str | None = None
    adapter: str | None = None
    wording: str | None = None
    words: Wording | None = None
    prompts: tuple[str, ...] = ()
    least_dim: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    memory_16bit: float | None = None
    memory_4bit: float | None = None
    origin: str | None = None

    def problems(self) -> list[str]:
        out = []
        if self.family not in FAMILIES:
            out.append(f"family: {self.family!r} is not one of {', '.join(FAMILIES)}")
        if self.wording is not None and self.wording not in WORDINGS:
            out.append(f"wording: {self.wording!r} is not one of {', '.join(WORDINGS)}; your own goes into a table, words")
        out += [f"prompts: there is no set {name!r}" for name in self.prompts if name not in PROMPT_SETS]
        if self.dim < 1 or not 1 <= (self.least_dim or 1) <= self.dim:
            out.append("dim, least_dim: 1 <= least_dim <= dim is needed")
        if not 1 <= (self.min_pixels or 1) <= (self.max_pixels or self.min_pixels or 1):
            out.append("min_pixels, max_pixels: 1 <= min_pixels <= max_pixels is needed")
        return out

    def said(self, family: W) -> Wording | W:
        """How it is spoken to; `family`: as its family is."""
        return self.words or (WORDINGS[self.wording] if self.wording else family)

    @property
    def declaration(self) -> str | None:
        """What of the user's own words changes vectors; None for a model of ours, whose revision says it all."""
        if self.origin is None:
            return None
        return repr((self.words or self.wording, self.min_pixels, self.max_pixels))


def known_models() -> dict[str, Known]:
    """All declared models by name: ours, and the user's own, which may take the place of ours.

    The user's file is `$E5V_MODELS`, or models.toml in the data home when it is there. Raises UsageError naming every
    problem of a file.
    """
    ours = _tables(OURS)
    models = _parsed(OURS, ours)
    named = os.environ.get(OWN_FILE)
    path = Path(named).expanduser() if named else data_home() / "models.toml"
    if not named and not path.exists():
        return models
    return models | _parsed(path, _inherited(path, ours, _tables(path)))


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"models {path}: {error}") from error


def _inherited(path: Path, ours: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The user's tables, with what they leave to the model of ours that they are `like`."""
    out = {}
    for name, table in own.items():
        if not isinstance(table, dict):
            raise UsageError(f"models {path}: {name}: a table is needed, not {table!r}")
        table = {"origin": str(path)} | table
        if (like := table.pop("like", None)) is not None:
            if like not in ours:
                raise UsageError(f"models {path}: {name}.like: {like!r} is not one of {', '.join(ours)}")
            base = {"hub": like} | ours[like]
            if "hub" in table:
                base.pop("revision", None)  # of the other place
            table = base | table
        out[name] = table
    return out


def _parsed(path: Path, tables: Mapping[str, Any]) -> dict[str, Known]:
    models, problems = {}, []
    for name, table in tables.items():
        try:
            models[name] = parse(Known, {"name": name} | table, name)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError(f"models {path}: {'; '.join(problems)}")
    return models
