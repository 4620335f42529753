"""Text to filter: lark reads the shape, `values` each value. Whatever the text, the answer is a Filter or a QueryError."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from e5v_search.errors import QueryError
from e5v_search.filters import values
from e5v_search.filters.tree import EVERYTHING, And, Filter, Not, Or

if TYPE_CHECKING:
    from lark import Lark
    from lark.exceptions import UnexpectedInput

_GRAMMAR = r"""
?start: either
?either: both (_OR both)*
?both: negated (_AND negated)*
?negated: _NOT negated -> negation
        | "(" either ")"
        | NAME OPERATOR value ("|" value)* -> condition
        | _HAS NAME -> has
?value: BARE | QUOTED

_AND.2: /and(?![\w.])/i
_OR.2: /or(?![\w.])/i
_NOT.2: /not(?![\w.])/i
_HAS.2: /has(?![\w.])/i
NAME: /[a-z_][\w-]*(\.([\w-]+|"[^"]+"))*/i
OPERATOR: "=" | "!=" | "<" | "<=" | ">" | ">=" | "~"
QUOTED: /"(\\.|[^"\\])*"|'(\\.|[^'\\])*'/s
BARE: /(\\.|[^\s()|"'=<>])(\\.|[^\s()|])*/s
%ignore /\s+/
"""
_MAX_LENGTH = 4000  # characters of one expression
_MAX_DEPTH = 20  # SQLite's own limit may be as low as 100


def parse(expressions: Sequence[str]) -> Filter:
    """One filter that passes what all `expressions` pass; without any, EVERYTHING.

    Raises QueryError: one line with the expression, the column in it and what was expected there.
    """
    found = tuple(_parse(expression) for expression in expressions)
    return found[0] if len(found) == 1 else And(found) if found else EVERYTHING


def _parse(text: str) -> Filter:
    from lark.exceptions import UnexpectedInput

    try:
        if len(text) > _MAX_LENGTH:
            raise values.Wrong(_MAX_LENGTH, f"a filter has at most {_MAX_LENGTH} characters, this one has {len(text)}")
        if not text.strip():
            raise values.Wrong(0, "the filter is empty; write for example kind=image")
        try:
            tree = _parser().parse(text)
        except UnexpectedInput as error:
            raise _syntax(error, text) from None
        return _filter(tree, 0)
    except values.Wrong as wrong:
        shown = repr(text if len(text) <= 200 else text[:199] + "…")
        raise QueryError(f"--where {shown}: column {wrong.at + 1}: {wrong}") from None


@cache
def _parser() -> "Lark":
    from lark import Lark

    return Lark(_GRAMMAR, parser="lalr")


def _filter(tree: Any, depth: int) -> Filter:
    if tree.data == "condition":
        name, operator, *found = tree.children
        return values.condition(name, operator, found)
    if tree.data == "has":
        return values.has(tree.children[0])
    if depth == _MAX_DEPTH:
        raise values.Wrong(0, f"it is nested more than {_MAX_DEPTH} levels deep")
    parts = tuple(_filter(child, depth + 1) for child in tree.children)
    if tree.data == "negation":
        return Not(parts[0])
    return And(parts) if tree.data == "both" else Or(parts)


def _syntax(error: "UnexpectedInput", text: str) -> values.Wrong:
    found = getattr(error, "token", None)
    # lark places the end of a text at its last token
    at = len(text.rstrip()) if found is not None and found.type == "$END" else error.pos_in_stream or 0
    expected: set[str] = getattr(error, "accepts", None) or getattr(error, "allowed", None) or set()
    rest = text[at:]
    if "BARE" in expected:
        if rest[:1] in ("'", '"'):
            return values.Wrong(at, "the quote that opens here is not closed")
        return values.Wrong(at, "a value is missing; put one with blanks, brackets, | or = in quotes")
    if "OPERATOR" in expected:
        return values.Wrong(at, f"an operator is missing: one of {' '.join(values.OPERATORS)}")
    if "NAME" in expected:
        return values.Wrong(at, f"a name is missing; known are {values.NAMES}")
    needed = "'and', 'or'" + (" or ')'" if "RPAR" in expected else " or the end")
    return values.Wrong(at, f"{needed} must come here; put a value with blanks or brackets in quotes")
