"""Where a model's files are, of which family it is, and which model `auto` means here."""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from e5v_search.backbones import Embedder, adapters
from e5v_search.backbones.adapters import Adapter, read_adapter
from e5v_search.backbones.checkpoint import MODULES, digest, modules, read_json, weights
from e5v_search.backbones.known import FAMILIES, SENTENCE_TRANSFORMERS, Known, known_models
from e5v_search.errors import IncompleteCheckpoint, ModelError, UnknownModel, UsageError
from e5v_search.prompts import Wording

TINY = "e5v-tiny"
E5V = "royokong/e5-v"
BUNDLED = Path(__file__).parent.parent / "bundled"
_SETTINGS = ["config.json", "*/config.json", MODULES]  # that tell which family a model is of
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `name` and `revision` go into the fingerprint; `known` is its declaration."""

    name: str
    revision: str
    folder: Path
    known: Known | None = None

    def said(self, family: Wording) -> Wording:
        """How the model is spoken to, when its family is spoken to so."""
        return family if self.known is None else self.known.said(family)

    def cut(self, dim: int, wanted: int | None) -> int | None:
        """What the model's vectors of `dim` numbers are to be cut to, if at all. UsageError when not trained for that."""
        least = None if self.known is None else self.known.least_dim
        name = self.folder if self.known is None else self.known.name
        if wanted is None or wanted == dim:
            return None
        if least is None:
            raise UsageError(
                f"{name} is not known to be trained for shorter vectors than its {dim} numbers: leave --dim out "
                "(a model of yours that was: declare it in models.toml, with least_dim)"
            )
        if not least <= wanted < dim:
            raise UsageError(f"--dim {wanted}: vectors of {name} can have {least} to {dim} numbers")
        return wanted

    def adapter(self, asked: str | None) -> tuple[Adapter, str] | None:
        """What is to be merged into the model, and what to call that: an adapter that is asked for, or that belongs to it."""
        own = None if self.known is None else self.known.adapter
        if asked and own:
            raise UsageError(f"{self.name} is a model with an adapter in it already ({own}): leave --adapter out")
        if not (where := asked or own):
            return None
        found = resolve_adapter(where)
        return read_adapter(found.folder), f"{found.name}@{found.revision[:12]}"


def resolve(model: str) -> Source:
    """Find a model: a known name, a folder, or a hub id (`owner/name`, `owner/name@revision`), fetched when not cached.

    Raises UnknownModel listing what is known, IncompleteCheckpoint, or ModelError when the hub cannot be reached.
    """
    models = known_models()
    if model == TINY:
        return Source(TINY, digest(BUNDLED / TINY), BUNDLED / TINY, models[TINY])
    name, _, revision = model.partition("@")
    known = models.get(name)
    if known is None or Path(model).expanduser().is_dir():
        return _found(model, list(models))
    found = _found(known.hub or name, list(models), revision or known.revision)
    if known.declaration is None:
        return Source(name, found.revision, found.folder, known)
    # other words to the same weights make another space
    revision = hashlib.sha256(f"{found.revision} {known.declaration}".encode()).hexdigest()
    return Source(name, revision, found.folder, known)


def resolve_adapter(adapter: str) -> Source:
    """Find an adapter: a folder, or a hub id with or without `@revision`. Raises what `resolve` does."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return Source("local", adapters.digest(folder), folder)
    if folder.is_absolute() or adapter.startswith((".", "~")) or not HUB_ID.fullmatch(adapter):
        raise UnknownModel(f"no adapter {adapter}: give the folder of one (with {adapters.CONFIG}), or a hub id owner/name")
    name, _, revision = adapter.partition("@")
    return _from_hub(name, revision or None, [], adapters.check)


def _found(model: str, known: list[str], revision: str | None = None) -> Source:
    """A folder or a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Source("local", digest(folder), folder)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise UnknownModel(f"no folder {model}: give an existing model folder or one of {', '.join(known)}")
    if HUB_ID.fullmatch(model):
        name, _, asked = model.partition("@")
        return _from_hub(name, asked or revision, known, weights, family_name)
    raise UnknownModel(f"unknown model {model!r}{_meant(model, known, 'any hub id owner/name, or a model folder')}")


def _meant(model: str, known: Iterable[str], also: str) -> str:
    """The known model whose name ends so, or nearly; where there is none, all of them."""
    by_ending = {name.rpartition("/")[2].lower(): name for name in known}
    if near := get_close_matches(model.lower(), by_ending, 1):
        return f": did you mean {by_ending[near[0]]}? All are listed by: e5v-search models"
    return f"; known: {', '.join(by_ending.values())}, {also}"


def family(source: Source) -> type[Embedder]:
    """The class for a model. ModelError with the list of families for a model of none of them, or of another than declared."""
    chosen = FAMILIES[family_name(source)]
    found: type[Embedder] = getattr(import_module(f"e5v_search.backbones.{chosen.module}"), chosen.embedder)
    return found


def family_name(source: Source) -> str:
    """The key in `FAMILIES`. See `family`."""
    declared = None if source.known is None else source.known.family
    parts = modules(source.folder)
    config = read_json(path) if (path := source.folder / "config.json").exists() or not parts else {}
    model_type = config.get("model_type")
    undeclared = declared is None and (model_type not in FAMILIES or not _as_the_family(source.folder, parts))
    if parts and (undeclared or declared == SENTENCE_TRANSFORMERS):
        model_type = SENTENCE_TRANSFORMERS
    if model_type not in FAMILIES:
        known = "; ".join(f"{key} ({each.what})" for key, each in FAMILIES.items())
        own = "; code of its author, which it brings, is not run" if "auto_map" in config else ""
        raise ModelError(f"{source.folder} holds a {model_type or 'nameless'!r} model; supported: {known}{own}")
    if source.known is not None and declared != model_type:
        raise ModelError(
            f"{source.known.name} is declared as {declared}, but {source.folder} holds a {model_type} model; "
            f"set its family right{f' in {source.known.origin}' if source.known.origin else ''}"
        )
    return str(model_type)


def _as_the_family(folder: Path, parts: list[dict[str, Any]]) -> bool:
    """Whether a folder of sentence-transformers asks for no more than what a family does anyway: the last token, length 1."""
    kinds = [str(part.get("type")).rpartition(".")[2] for part in parts]
    if not set(kinds) <= {"Transformer", "CLIPModel", "Pooling", "Normalize"}:
        return False
    poolings = [
        read_json(folder / str(part.get("path")) / "config.json")
        for part, kind in zip(parts, kinds, strict=True)
        if kind == "Pooling"
    ]
    return all(each.get("pooling_mode") == "lasttoken" or each.get("pooling_mode_lasttoken") for each in poolings)


def describe(model: str) -> dict[str, Any]:
    """All that is known of a model by its name, or of a checkpoint folder, without loading or fetching anything.

    Raises UnknownModel, and for a folder what `family` does.
    """
    models = known_models()
    if model not in models:
        if not Path(model).expanduser().is_dir():
            raise UnknownModel(f"nothing is known of {model!r}{_meant(model, models, 'or a checkpoint folder')}")
        source = resolve(model)
        of = family_name(source)
        return {"name": model, "family": of, **_family_facts(of), "revision": source.revision, "here": True}
    known = models[model]
    told = asdict(known)
    told["prompts"] = list(known.prompts)
    told["memory_gib"] = {"16bit": told.pop("memory_16bit"), "4bit": told.pop("memory_4bit")}
    told["words"] = None if (words := known.said(None)) is None else {k: v for k, v in asdict(words).items() if v}
    return told | _family_facts(known.family) | {"here": _is_here(known)}


def _family_facts(name: str) -> dict[str, Any]:
    family = FAMILIES[name]
    return {"models_of_it": family.what, "pooling": family.pooling, "normalised": True, "takes": list(family.takes)}


def _is_here(known: Known) -> bool:
    where = known.hub or known.name
    folder = BUNDLED / where if where == TINY else Path(where).expanduser()
    try:
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(where, "config.json", revision=known.revision)
            if not isinstance(config, str):
                return False
            folder = Path(config).parent
        return bool(weights(folder))
    except IncompleteCheckpoint:
        return False


def _from_hub(
    name: str,
    revision: str | None,
    known: list[str],
    check: Callable[[Path], object],
    first: Callable[[Source], object] | None = None,
) -> Source:
    """`check` raises IncompleteCheckpoint for a folder that is not whole, `first` whatever can be known from its settings."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "vocab.txt", "merges.txt"]
    try:
        # a pinned snapshot that is complete in the cache needs no network
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        check(folder)
        return Source(name, folder.name, folder)
    except (LocalEntryNotFoundError, IncompleteCheckpoint):
        pass
    try:
        if first is not None:  # what will be refused need not be fetched
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SETTINGS))
            first(Source(name, folder.name, folder))
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except RepositoryNotFoundError:
        others = f"; known: {', '.join(known)}" if known else ""
        raise UnknownModel(f"the model hub has no {name!r} (or it is private: log in with `hf auth login`){others}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{name} is not on this machine and could not be fetched ({reason}); "
            f"check the network, or copy the model here and give its folder, or use --model {TINY}"
        ) from error
    return Source(name, folder.name, folder)


def choose(free_cuda_bytes: int | None) -> tuple[str, str | None, str]:
    """What `auto` means with so much free CUDA memory (None: no CUDA): (model, quantize, one line that says so)."""
    gib = (free_cuda_bytes or 0) / 2**30
    if gib >= 20:
        return E5V, None, f"model auto: {E5V} in bfloat16 ({gib:.0f} GiB free on the GPU)"
    if gib >= 8:
        return E5V, "4bit", f"model auto: {E5V} in 4 bit ({gib:.0f} GiB free on the GPU)"
    why = "no CUDA GPU" if free_cuda_bytes is None else f"only {gib:.1f} GiB free on the GPU"
    return TINY, None, f"model auto: the small bundled {TINY} ({why}); for the paper's 8B model say --model {E5V}"
