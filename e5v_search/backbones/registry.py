"""Models by name: what is known, where its files are, and which one `auto` means here."""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from e5v_search.backbones import Embedder
from e5v_search.backbones.checkpoint import digest, read_json, shards
from e5v_search.errors import IncompleteCheckpoint, ModelError, UnknownModel

TINY = "e5v-tiny"
E5V = "royokong/e5-v"
BUNDLED = Path(__file__).parent.parent / "bundled"

# model_type of a config.json -> (module here, class, what it is); a module is loaded with the first model of its family
FAMILIES = {
    "llava_next": ("llava_next", "LlavaNextEmbedder", "E5-V, LLaVA-1.6"),
    "clip": ("two_towers", "TwoTowers", "CLIP"),
    "siglip": ("two_towers", "TwoTowers", "SigLIP, SigLIP 2 of fixed resolution"),
}


@dataclass(frozen=True)
class Known:
    """A model that can be named. `revision` pins a hub id; memory in GiB for the weights alone."""

    name: str
    summary: str
    dim: int
    licence: str
    revision: str | None = None
    memory_16bit: float = 0.0
    memory_4bit: float = 0.0


KNOWN: dict[str, Known] = {
    known.name: known
    for known in (
        Known(
            TINY,
            "bundled; small LLaVA-NeXT of our own, trained from scratch, for a laptop's processor",
            256,
            "research only: its training photos are for non-commercial research",
            memory_16bit=0.03,
        ),
        Known(
            E5V,
            "the paper's model: LLaVA-NeXT on LLaMA-3 8B, tuned on text pairs alone",
            4096,
            "see its model card; built on LLaMA 3",
            revision="0c1f22679417b3ae925d779442221c40cd1861ab",
            memory_16bit=15.6,
            memory_4bit=5.5,
        ),
        Known(
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "LLaVA-NeXT on Mistral 7B, not tuned for retrieval (the paper's Table 8 before tuning)",
            4096,
            "Apache-2.0",
            memory_16bit=14.1,
            memory_4bit=4.9,
        ),
        Known(
            "openai/clip-vit-large-patch14",
            "CLIP, a baseline: one tower for pictures, one for texts",
            768,
            "see its model card",
            memory_16bit=0.8,
        ),
        Known(
            "google/siglip2-so400m-patch14-384",
            "SigLIP 2, a baseline: one tower for pictures, one for texts",
            1152,
            "Apache-2.0",
            memory_16bit=2.1,
        ),
    )
}


@dataclass(frozen=True)
class Source:
    """A model's files on this machine. `name` and `revision` go into the fingerprint."""

    name: str
    revision: str
    folder: Path


def resolve(model: str) -> Source:
    """Find a model: a known name, a folder, or a hub id (`owner/name`, `owner/name@revision`), fetched when not cached.

    Raises UnknownModel listing what is known, IncompleteCheckpoint, or ModelError when the hub cannot be reached.
    """
    if model == TINY:
        return Source(TINY, digest(BUNDLED / TINY), BUNDLED / TINY)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Source("local", digest(folder), folder)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise UnknownModel(f"no folder {model}: give an existing model folder or one of {', '.join(KNOWN)}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model):
        name, _, revision = model.partition("@")
        known = KNOWN.get(name)
        return _from_hub(name, revision or (known.revision if known else None))
    raise UnknownModel(f"unknown model {model!r}; known: {', '.join(KNOWN)}, any hub id owner/name, or a model folder")


def family(folder: Path) -> type[Embedder]:
    """The class for a checkpoint folder. ModelError with the list of families for a model of none of them."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in FAMILIES:
        known = "; ".join(f"{key} ({what})" for key, (_, _, what) in FAMILIES.items())
        raise ModelError(f"{folder} holds a {model_type or 'nameless'!r} model; supported: {known}")
    module, name, _ = FAMILIES[model_type]
    found: type[Embedder] = getattr(import_module(f"e5v_search.backbones.{module}"), name)
    return found


def _from_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        # a pinned snapshot that is complete in the cache needs no network
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        shards(folder)
        return Source(name, folder.name, folder)
    except (LocalEntryNotFoundError, IncompleteCheckpoint):
        pass
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise UnknownModel(
            f"the model hub has no {name!r} (or it is private: log in with `hf auth login`); known: {', '.join(KNOWN)}"
        ) from None
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
