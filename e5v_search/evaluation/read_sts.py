"""The seven STS tasks in SentEval's layout."""

from pathlib import Path

from e5v_search.errors import DataError
from e5v_search.evaluation.files import digest, first_of, text_lines
from e5v_search.evaluation.records import Loaded, Pair, Rating

# STS13's SMT is not in SentEval either
SUBSETS = {
    "sts12": ("STS12-en-test", ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews")),
    "sts13": ("STS13-en-test", ("FNWN", "headlines", "OnWN")),
    "sts14": ("STS14-en-test", ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news")),
    "sts15": ("STS15-en-test", ("answers-forums", "answers-students", "belief", "headlines", "images")),
    "sts16": ("STS16-en-test", ("answer-answer", "headlines", "plagiarism", "postediting", "question-question")),
}
_ROOTS = ("STS/STS12-en-test", "sts/STS/STS12-en-test", "downstream/STS/STS12-en-test", "data/downstream/STS/STS12-en-test")


def sts(data: Path) -> Loaded:
    root = first_of(data, _ROOTS, "STS tasks in SentEval's layout").parent.parent
    tasks, files = {}, []
    for task, (folder, subsets) in SUBSETS.items():
        pairs: list[Pair] = []
        for subset in subsets:
            inputs, gold = (root / "STS" / folder / f"STS.{kind}.{subset}.txt" for kind in ("input", "gs"))
            files += [inputs, gold]
            pairs += _subset(inputs, gold)
        tasks[task] = tuple(pairs)
    for task, path, columns in (
        ("stsb", root / "STS/STSBenchmark/sts-test.csv", (5, 6, 4)),
        ("sickr", root / "SICK/SICK_test_annotated.txt", (1, 2, 3)),
    ):
        files.append(path)
        tasks[task] = tuple(_table(path, columns, header=task == "sickr"))
    lower = all(text == text.lower() for pair in tasks["sts12"] for text in (pair.a, pair.b))
    note = "lower-cased and tokenised, as SentEval's script leaves it" if lower else "in its original case and spacing"
    return Loaded(Rating(tasks), str(root), digest(files), (f"text of STS12-16 and STS-B: {note}",))


def _subset(inputs: Path, gold: Path) -> list[Pair]:
    """Pairs of one file, one a line; a blank score means that nobody rated the pair."""
    lines, scores = text_lines(inputs), text_lines(gold)
    if len(lines) != len(scores):
        raise DataError(f"{inputs} has {len(lines)} lines and {gold.name} {len(scores)}")
    rated = [(n, line, score) for n, (line, score) in enumerate(zip(lines, scores, strict=True), 1) if score.strip()]
    return [_pair(inputs, n, line.split("\t")[:2], score) for n, line, score in rated]


def _table(path: Path, columns: tuple[int, int, int], header: bool) -> list[Pair]:
    pairs = []
    for number, line in enumerate(text_lines(path), 1):
        if number == 1 and header:
            continue
        cells = line.split("\t")
        if len(cells) <= max(columns):
            raise DataError(f"{path}:{number}: {max(columns) + 1} columns are needed, not {len(cells)}")
        a, b, score = (cells[i] for i in columns)
        pairs.append(_pair(path, number, [a, b], score))
    return pairs


def _pair(path: Path, number: int, texts: list[str], score: str) -> Pair:
    try:
        a, b = texts
        return Pair(a, b, float(score))
    except ValueError:
        raise DataError(f"{path}:{number}: two sentences and a number are needed, not {texts} and {score!r}") from None
