"""Any model that sentence-transformers loads: texts, and pictures or both at once where the model reads them.

How such a model makes a vector is its own affair (`modules.json`): its chat template, its pooling, its layers behind that.
Ours is what goes in. What is asked is a query and a picture a document, as in `encode_query` and `encode_document`, with
the prompts that the model has for these; our prompt sets, which are E5-V's, say nothing to it. The user's `--instruction`
takes the place of these prompts, and so does one that the model knows by name (`model:NAME`).
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from e5v_search.backbones import checkpoint, library, registry
from e5v_search.backbones.adapters import CONFIG as ADAPTER
from e5v_search.backbones.batches import TEXTS, WINDOW, Batches, unit
from e5v_search.backbones.tiles import Size
from e5v_search.backbones.words import Wordless
from e5v_search.config import ModelChoice
from e5v_search.embedder import Fingerprint, Picture
from e5v_search.errors import IncompleteCheckpoint, MissingPackage, ModelError, UsageError
from e5v_search.parallel import ahead
from e5v_search.prompts import load_prompts

_OWN = "sentence_transformers."  # where the classes of modules.json come from: all else is somebody's code
_LEAST_VERSION = 6  # the first that runs no code of a local folder unasked
_DOCUMENTS = ("document", "passage", "corpus")  # as encode_document has them
_MOST_PIXELS = 4_000_000  # of a picture on its way to the model; many wait at once
_PICTURE_TOKENS = 600  # that a picture may cost; how many really, only the model knows


class SentenceTransformerEmbedder(Wordless):
    def __init__(self, source: registry.Source, choice: ModelChoice) -> None:
        self.name, self.quantize, self.tiles, self.adapter = choice.name, None, "auto", None
        self.device = checkpoint.pick_device(choice.device)
        numbers = sum(path.stat().st_size for path in checkpoint.weights(source.folder)) / 2
        self.dtype = checkpoint.pick_dtype(choice.dtype, self.device, numbers)
        self.model = load(source.folder, self.device, self.dtype)
        self.batches = Batches(self.device, relieve=lambda: 0)
        self._cut, self.dim = None, 0
        # what it says of itself is not always right
        whole = self._embed([{"text": "a"} if self.model.supports("text") else {"image": Image.new("RGB", (64, 64))}]).shape[1]
        self._cut = source.cut(whole, choice.dim)
        self.dim = self._cut or whole
        self.made_by = Fingerprint(source.name, source.revision, backend=self._backend(), tiles="none", dim=self._cut)

    def _backend(self) -> str:
        processor = getattr(self.model[0], "processor", None)
        pixels = type(getattr(processor, "image_processor", processor)).__name__
        return "torchvision" if self.model.supports("image") and not pixels.endswith("Pil") else "pil"

    # what goes in

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        """Sentences -> (n, dim); one that is too long is cut where the model cuts it."""
        self._needs("text", "texts")
        # named as texts: sentence-transformers would take one that looks like a file's name or an address for a picture
        return unit(self._embed([{"text": text} for text in texts], window=TEXTS, **self._asked("text", prompts)))

    def embed_images(self, images: Sequence[Picture], prompts: str = "retrieval") -> np.ndarray:
        """Pictures (paths, encoded bytes or PIL images) -> (n, dim), read ahead in threads. MediaError names the picture."""
        return self._embed_pictures(ahead(self.open, images), prompts)

    def embed_composed(
        self, pairs: Sequence[tuple[Picture, str]], prompts: str = "cirr", *, normalise: bool = True
    ) -> np.ndarray:
        """Pictures, each with the change to it -> (n, dim): read together, or the sum of the two embeddings."""
        pictures, texts = [picture for picture, _ in pairs], [text for _, text in pairs]
        if self.model.supports(("image", "text")):
            both = zip(ahead(self.open, pictures), texts, strict=True)
            x = self._embed(({"image": picture, "text": text} for picture, text in both), **self._asked("composed", prompts))
        else:
            x = self.embed_images(pictures, prompts) + self.embed_texts(texts, prompts)
        return unit(x) if normalise else x

    def enough(self, size: Size) -> Size:
        shrink = min(1.0, (_MOST_PIXELS / (size[0] * size[1])) ** 0.5)
        return max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink))

    def prepare(self, image: Image.Image, size: Size | None = None) -> Image.Image:
        """An upright RGB picture -> the same, or less of it if it is huge. Called from many threads."""
        self._needs("image", "pictures")
        height, width = self.enough((image.height, image.width))
        whole = image.convert("RGB")
        return whole if (width, height) == whole.size else whole.resize((width, height), Image.Resampling.LANCZOS)

    def embed_prepared(self, prepared: Sequence[Image.Image], prompts: str = "retrieval") -> np.ndarray:
        return self._embed_pictures(prepared, prompts)

    def embed_views(self, prepared: Sequence[Image.Image], views: Sequence[str]) -> np.ndarray:
        return np.stack([self._embed_pictures(prepared, view) for view in views])

    def _embed_pictures(self, pictures: Iterable[Image.Image], prompts: str) -> np.ndarray:
        self._needs("image", "pictures")
        return unit(self._embed(({"image": picture} for picture in pictures), **self._asked("image", prompts)))

    def _needs(self, modality: str, what: str) -> None:
        if not self.model.supports(modality):
            reads = " and ".join(f"{each}s" for each in self.model.modalities if each != "message")
            raise ModelError(f"{self.name} reads {reads}, no {what}: take another model for them")

    def _asked(self, kind: str, prompts: str) -> dict[str, Any]:
        """What `encode_query` or `encode_document` is told of a prompt set. Raises UsageError."""
        chosen = load_prompts(prompts)
        if chosen.literal:
            raise UsageError(
                f"--prompts {prompts}: {self.name} has prompts of its own ({self._names}); give model:NAME, or an --instruction"
            )
        document = kind == "image" or chosen.named in _DOCUMENTS
        told: dict[str, Any] = {"document": document}
        if chosen.named is not None:
            if chosen.named not in self.model.prompts:
                raise UsageError(f"{self.name} has no prompt {chosen.named!r}; it has: {self._names}")
            told["prompt"] = self.model.prompts[chosen.named]
        elif chosen.asked is not None:
            if kind == "image" and not self.model.supports("message"):
                raise UsageError(f"{self.name} reads pictures without any words: leave --instruction out")
            told["prompt"] = chosen.asked if self.model.supports("message") else f"{chosen.asked} "
        return told

    @property
    def _names(self) -> str:
        return ", ".join(self.model.prompts) or "none"

    # how it goes through

    def _embed(
        self, inputs: Iterable[dict[str, Any]], document: bool = False, prompt: str | None = None, window: int = WINDOW
    ) -> np.ndarray:
        """-> (n, dim), not normalised"""
        encode = self.model.encode_document if document else self.model.encode_query
        plain = not self.model.supports("image")  # some modules for texts know nothing of dictionaries

        def forward(batch: Sequence[dict[str, Any]]) -> np.ndarray:
            with _told(self.name):
                x = encode(
                    [one["text"] for one in batch] if plain else list(batch),
                    prompt=prompt,
                    batch_size=len(batch),
                    show_progress_bar=False,
                    truncate_dim=self._cut or self.model.truncate_dim,
                )
            return np.asarray(x, np.float32)

        return self.batches.embed(inputs, self._length, forward, self.dim, window)

    def _length(self, one: dict[str, Any]) -> int:
        text = len(one.get("text", "")) // 3 + 4  # about three letters a token
        return min(text, self.model.max_seq_length or text) + _PICTURE_TOKENS * ("image" in one)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever a model's parts raise, as one line; memory that has run out is dealt with elsewhere."""
    try:
        yield
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise ModelError(f"sentence-transformers cannot embed with {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load(folder: Path, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The SentenceTransformer in a folder, on a device (None: the best there is), in a precision (None: its own).

    Raises MissingPackage without the library, IncompleteCheckpoint for weights that are missing or pickled, ModelError for
    code of the model's author, which is not run, for another kind of model, and for what the library refuses.
    """
    check(folder)
    try:
        import sentence_transformers
    except ImportError:
        raise MissingPackage("a model of sentence-transformers needs it: pip install 'e5v-search[st]'") from None
    if int(sentence_transformers.__version__.partition(".")[0]) < _LEAST_VERSION:
        raise MissingPackage(f"sentence-transformers {_LEAST_VERSION} or newer is needed: pip install -U 'e5v-search[st]'")
    with _missing_tensors() as missing:
        try:
            model = sentence_transformers.SentenceTransformer(
                str(folder),
                device=None if device is None else str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"dtype": "auto" if dtype is None else dtype, "use_safetensors": True},
                processor_kwargs={"backend": "pil"},
            )
        except Exception as error:  # the library passes on whatever a model's parts raise
            if "trust_remote_code" in str(error):
                raise ModelError(f"{folder} needs code of its author, which is not run") from error
            raise ModelError(f"sentence-transformers cannot load {folder}: {_reason(error)}") from error
    # a pooler that nothing reads is often left out
    lost = [name for name in missing if "pooler" not in name or model[0].module_output_name != "token_embeddings"]
    if lost:
        raise IncompleteCheckpoint(f"{folder} lacks {len(lost)} tensors, the first is {lost[0]}; download the model again")
    _limit(model)
    _take_turns(model)
    return model.eval()


def check(folder: Path) -> None:
    """What can be refused without loading anything. See `load`."""
    checkpoint.weights(folder)
    for module in checkpoint.modules(folder):
        if not str(module.get("type")).startswith(_OWN):
            raise ModelError(f"{folder} needs code of its author ({module.get('type')}), which is not run")
    if next(folder.rglob(ADAPTER), None) is not None:
        raise ModelError(f"{folder} holds an adapter to a model that is elsewhere: save the two merged, and give that folder")
    settings = folder / "config_sentence_transformers.json"
    kind = checkpoint.read_json(settings).get("model_type", "SentenceTransformer") if settings.exists() else None
    if kind not in (None, "SentenceTransformer"):
        raise ModelError(f"{folder} holds a {kind} of sentence-transformers, which gives no single vector of an input")


def _limit(model: Any) -> None:
    """Texts are cut where the positions end, also in models of which the library does not see that they do."""
    config = getattr(model[0], "config", None)
    text = None if config is None else config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if text is not config and most is not None and (model.max_seq_length or most + 1) > most:
        model.max_seq_length = most


def _take_turns(model: Any) -> None:
    """Batches may be under way side by side, but a tokenizer can be used by one thread at a time."""
    prepare, turn = model.preprocess, Lock()

    def in_turn(*inputs: Any, **told: Any) -> Any:
        with turn:
            return prepare(*inputs, **told)

    model.preprocess = in_turn


@contextmanager
def _missing_tensors() -> Iterator[list[str]]:
    """The names of tensors that transformers makes up because a checkpoint lacks them: it says so in its log alone."""
    found: list[str] = []

    class Report(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines = re.sub("\x1b\\[[0-9;]*m", "", record.getMessage()).splitlines()
            found.extend(line.split("|")[0].strip() for line in lines if re.search(r"\|\s*MISSING", line))

    log, handler = logging.getLogger("transformers.modeling_utils"), Report(logging.WARNING)
    propagates, level = log.propagate, log.level
    with library.quiet():
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.WARNING)
        try:
            yield found
        finally:
            log.removeHandler(handler)
            log.propagate = propagates
            log.setLevel(level)
