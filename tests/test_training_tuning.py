from pathlib import Path

import pytest

from e5v_search.config import parse
from e5v_search.errors import UsageError
from e5v_search.prompts import load_prompts
from e5v_search.training.recipes import read_recipe
from e5v_search.training.tuning import INPUTS, Tuning

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "training").glob("*.toml"))
TUNING = [p for p in RECIPES if "[[stages]]" not in p.read_text()]


def recipe(**changes: object) -> Tuning:
    data: dict[str, object] = {"name": "x", "model": "e5v-tiny", "examples": {"kind": "triplets", "file": "nli.csv"}}
    return parse(Tuning, data | changes, "x")


@pytest.mark.parametrize("path", TUNING, ids=lambda p: p.stem)
def test_every_recipe_parses_and_has_its_prompts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = read_recipe(path)
    assert isinstance(found, Tuning)
    assert found.name == path.stem
    found.prompts.check(INPUTS[found.examples.kind])
    assert found.name in (ROOT / "training/README.md").read_text(), "each recipe has its row"


def test_there_are_the_recipes_of_the_papers() -> None:
    wanted = {"e5v-llava-next-8b", "e5v-mistral", "unime-stage1", "unime-stage2", "image-text", "e5v-tiny-lora"}
    assert wanted <= {path.stem for path in TUNING}


def test_the_papers_run_is_as_published() -> None:
    found = read_recipe(ROOT / "training/e5v-llava-next-8b.toml")
    assert isinstance(found, Tuning)
    assert (found.batch, found.epochs, found.rate, found.warmup, found.max_text) == (768, 2, 4e-4, 100, 32)
    assert found.lora is not None
    assert (found.lora.rank, found.lora.alpha, found.lora.dropout) == (64, 16, 0.05)
    assert (found.quantize, found.checkpointing, found.loss.temperature) == ("nf4", True, 0.05)
    assert not found.quirks
    assert found.parts == "language"
    assert found.steps_for(275_601) == 718


def test_the_rate_warms_up_and_falls_in_a_line() -> None:
    found = recipe(rate=1.0, warmup=2, steps=6)
    assert [found.rate_at(i, 6) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert recipe(rate=1.0, warmup=0).rate_at(0, 4) == 1.0


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        recipe(batch=0, warmup=-1, quantize="nf4", steps=0, loss={"kind": "symmetric"})
    for part in ("batch: must be", "warmup: must not", "quantize: ", "steps: ", "symmetric does not go with triplets"):
        assert part in str(raised.value)
    with pytest.raises(UsageError, match=r"loss\.temperature: must be positive; loss\.hardest: .*loss\.teacher: the dist"):
        recipe(loss={"kind": "distillation", "temperature": 0, "hardest": 0})
    with pytest.raises(UsageError, match=r"loss\.teacher: contrastive has none"):
        recipe(loss={"teacher": "all-minilm-l6-v2"})
    with pytest.raises(UsageError, match=r"examples\.negatives: a triplet has one; examples\.split: triplets have none"):
        recipe(examples={"kind": "triplets", "file": "x", "split": "y", "negatives": 2})
    with pytest.raises(UsageError, match=r"lora\.rank"):
        recipe(lora={"rank": 0})


@pytest.mark.parametrize(
    ("kind", "evaluate", "parts"),
    [
        ("triplets", [], "language"),
        ("triplets", ["sts-dev"], "language"),
        ("triplets", ["flickr8k-dev"], "all"),
        ("captions", [], "all"),
        ("instructions", [], "all"),
    ],
)
def test_the_vision_tower_is_read_when_there_are_pictures(kind: str, evaluate: list[str], parts: str) -> None:
    assert recipe(examples={"kind": kind, "file": "x"}, evaluate=evaluate).parts == parts


def test_a_recipe_with_stages_is_of_the_other_kind(tmp_path: Path) -> None:
    assert not isinstance(read_recipe(ROOT / "training/e5v-tiny.toml"), Tuning)
    path = tmp_path / "x.toml"
    path.write_text('name = "x"\n')
    with pytest.raises(UsageError, match=r"recipe .*x\.toml: model: missing; examples: missing"):
        read_recipe(path)


def test_a_prompt_that_a_set_lacks_is_named() -> None:
    with pytest.raises(UsageError, match="'sts' has no image prompt"):
        recipe(prompts={"image": "sts"}).prompts.check(("text", "image"))
    assert load_prompts(ROOT / "training/prompts/instruction.toml").composed
