"""The one place where FAISS is imported, and where what it raises becomes an error of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from typing import Any

from e5v_search.errors import CollectionError, MissingPackage

_WHEELS = ("faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


def faiss_problem() -> str | None:
    """What keeps FAISS from working here, with the line that mends it; None when it is installed as it should be."""
    present = [name for name in _WHEELS if _installed(name)]
    if len(present) > 1:
        return (
            f"{' and '.join(present)} are both installed and overwrite each other; mend it with: "
            f"pip uninstall -y {' '.join(present)} && pip install faiss-cpu   (or faiss-gpu in its place)"
        )
    if util.find_spec("faiss") is None:
        return "FAISS is not installed; mend it with: pip install faiss-cpu   (or faiss-gpu, for an NVIDIA GPU)"
    return None


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def library() -> Any:
    """The module `faiss`. Raises MissingPackage."""
    problem = faiss_problem()
    if problem is not None:
        raise MissingPackage(problem)
    try:
        import faiss
    except ImportError as error:
        raise MissingPackage(
            f"FAISS cannot be loaded ({error}); mend it with: pip install --force-reinstall --no-deps faiss-cpu"
        ) from error
    return faiss


def gpus_of_faiss() -> int:
    """How many GPUs it can use, none in a build for processors alone. Raises MissingPackage."""
    return int(library().get_num_gpus())


def reason(error: Exception) -> str:
    """What FAISS, or whatever failed, says, without where in its source that is."""
    return str(error).partition("\n")[0].rpartition("Error: ")[2]


@contextmanager
def faiss_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise CollectionError(f"FAISS failed ({reason(error)}); make the index anew with: e5v-search rebuild") from error
