"""Half-precision rows as FAISS's scalar quantiser has them, in memory or mapped from a file, and their exact scan."""

from typing import Any

import numpy as np

from e5v_search.index.base import Found, best
from e5v_search.index.library import faiss_errors, library

_GATHERED = 1 << 26  # bytes of rows that a search of few of them may copy


def quantiser(d: int) -> Any:
    """An empty scalar quantiser of half precision, inner product."""
    faiss = library()
    return faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def view(index: Any, codes: np.ndarray) -> Any:
    """Let a FAISS index of flat codes use `codes` (n, code_size) uint8 where they are."""
    faiss = library()
    pointer = faiss.swig_ptr(codes)
    lent = faiss.MaybeOwnedVectorUInt8()
    lent.is_owned = False
    lent.view_data = lent.c_ptr = pointer
    lent.view_size = lent.c_size = codes.size
    index.codes = lent
    index.ntotal = len(codes)
    index.referenced_objects = [codes]  # FAISS itself keeps nothing but the address
    return index


def selector(chosen: np.ndarray) -> Any:
    """FAISS's selector of the places where chosen (n,) bool is true."""
    return library().IDSelectorBitmap(np.packbits(chosen, bitorder="little"))


def search(rows: Any, xq: np.ndarray, width: int, chosen: np.ndarray | None = None) -> Found:
    """Exactly the best `width` rows of a scalar quantiser; D, and I as places."""
    parameters = None if chosen is None else library().SearchParameters(sel=selector(chosen))
    with faiss_errors():
        found: Found = rows.search(xq, width, params=parameters)
    return found


def search_places(rows: Any, xq: np.ndarray, k: int, places: np.ndarray, names: np.ndarray) -> Found:
    """Exactly the best k among the distinct `places`; D, and I as `names` (of all places) call them."""
    n, size = rows.ntotal, rows.code_size
    # to copy few rows is cheaper than to ask of each of all whether it is meant
    if 0 < 16 * len(places) <= n and len(places) * size <= _GATHERED:
        few = codes_of(rows)[places]
        of_few = view(quantiser(rows.d), few)
        return best(lambda width: search(of_few, xq, width), k, len(places), len(xq), names[places])
    chosen = np.zeros(n, dtype=bool)
    chosen[places] = True
    return best(lambda width: search(rows, xq, width, chosen), k, len(places), len(xq), names)


def codes_of(rows: Any) -> np.ndarray:
    """The codes (n, code_size) uint8 of an index of flat codes, not copied."""
    codes: np.ndarray = library().rev_swig_ptr(rows.codes.data(), rows.ntotal * rows.code_size)
    return codes.reshape(rows.ntotal, rows.code_size)


def decoded(rows: Any, start: int, stop: int) -> np.ndarray:
    """Rows start:stop as float32 (stop - start, d)."""
    with faiss_errors():
        x: np.ndarray = rows.reconstruct_n(start, stop - start)
    return x
