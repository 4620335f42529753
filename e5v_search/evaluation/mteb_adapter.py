"""The engine as a model of mteb, for its benchmarks: texts, pictures, and both at once.

    import mteb
    from e5v_search import Embedder
    from e5v_search.evaluation.mteb_adapter import MtebModel

    mteb.evaluate(MtebModel(Embedder.load("e5v-tiny")), mteb.get_tasks(["STS12"]))

mteb is loaded when a model is made, and not before.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.embedder import Embedder, embed_each
from e5v_search.errors import MissingPackage, OutOfMemory, TextTooLong, UsageError
from e5v_search.evaluation.protocols import sts_sentence
from e5v_search.prompts import load_prompts, own_set

Batch = Mapping[str, Sequence[Any]]


class MtebModel:
    """`embedder` behind mteb's EncoderProtocol.

    The task decides on the prompt set: "sts" for STS on texts, "cirr" where queries are a picture and a text, else "retrieval".
    `prompts` takes the place of it, as `prompts.own_set` says. Sentences of STS are treated as in the paper. A picture with a
    text is a composed query; as a document, which asks for no change, it is the sum of both. Raises MissingPackage without
    mteb, UsageError for an unknown prompt set.
    """

    def __init__(self, embedder: Embedder, prompts: str | None = None) -> None:
        try:
            from mteb import similarity_functions
            from mteb.models import ModelMeta
        except ImportError:
            raise MissingPackage("mteb's benchmarks need one more package: pip install 'e5v-search[mteb]'") from None
        if prompts is not None:
            load_prompts(prompts)
        self.embedder, self.prompts = embedder, prompts
        self._similarities = similarity_functions
        made_by = embedder.made_by
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"e5v-search/{Path(made_by.model).name}",
            revision=made_by.revision,
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=embedder.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image"],
            # mteb keeps results by name and revision: these must not be taken for one another
            experiment_kwargs={
                "prompts": prompts or "by-task",
                "weights": made_by.weights,
                "backend": made_by.backend,
                "tiles": made_by.tiles,
            },
        )

    def encode(
        self,
        inputs: Iterable[Batch],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """-> (n, dim) float32, rows of length 1, one for each input of the batches, in their order."""
        prompts = own_set(self.prompts, _own_prompts(task_metadata))
        parts = [self._batch(batch, prompts, task_metadata, prompt_type) for batch in inputs]
        return np.concatenate([np.empty((0, self.embedder.dim), np.float32), *parts])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (n, m), as a tensor, which mteb's tasks expect."""
        return self._similarities.cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines (n,) of row with row, as a tensor."""
        return self._similarities.pairwise_cos_sim(embeddings1, embeddings2)

    def _batch(self, batch: Batch, prompts: str, task: Any, prompt_type: str | None) -> np.ndarray:
        kinds = {"text", "image", "audio", "video"} & batch.keys()
        if not kinds or not kinds <= {"text", "image"}:
            found = ", ".join(sorted(kinds or batch.keys()))
            raise UsageError(f"{task.name} has inputs that are no texts or pictures ({found}); choose another task")
        texts = list(batch.get("text", []))
        if task.type == "STS":
            texts = [sts_sentence(text) for text in texts]
        if kinds == {"text"}:
            return self._texts(texts, prompts)
        pictures = list(batch["image"])
        if kinds == {"image"}:
            return self.embedder.embed_images(pictures, prompts)
        if prompt_type == "query":
            return self.embedder.embed_composed(list(zip(pictures, texts, strict=True)), prompts)
        both = self.embedder.embed_images(pictures, prompts) + self._texts(texts, prompts)
        x: np.ndarray = both / np.linalg.norm(both, axis=1, keepdims=True)
        return x

    def _texts(self, texts: Sequence[str], prompts: str) -> np.ndarray:
        """Like all models of mteb it reads the beginning of a text that it cannot take whole, and warns."""
        vectors = []
        for text, vector in zip(texts, self._each(texts, prompts), strict=True):
            cut = text
            while isinstance(vector, TextTooLong) and cut:
                cut = cut[: len(cut) // 2]
                [vector] = self._each([cut], prompts)
            if isinstance(vector, Exception):
                raise vector
            if cut is not text:
                warnings.warn(f"read the first {len(cut):,} of {len(text):,} characters of {text[:60]!r}…", stacklevel=2)
            vectors.append(vector)
        return np.stack(vectors)

    def _each(self, texts: Sequence[str], prompts: str) -> list[np.ndarray | TextTooLong | OutOfMemory]:
        return embed_each(texts, lambda some: self.embedder.embed_texts(some, prompts))


def _own_prompts(task: Any) -> str:
    if task.type == "STS":
        return "sts"
    return "cirr" if (task.category or "").startswith("it2") else "retrieval"
