"""e5v-search: find pictures and texts by meaning (E5-V, arXiv 2407.12580).

    from e5v_search import Collection, Embedder

Everything public is here; importing it loads neither torch nor faiss before they are needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e5v_search.backbones import Embedder
    from e5v_search.collection import Collection, Hit, Hits, Report
    from e5v_search.config import ModelChoice

__version__ = "0.1.0"
__all__ = ["Collection", "Embedder", "Hit", "Hits", "ModelChoice", "Report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"Embedder": "backbones", "ModelChoice": "config"}.get(name, "collection")
    return getattr(import_module(f"e5v_search.{home}"), name)
