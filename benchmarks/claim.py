"""The paper's claim in small: a base that has never told pairs apart, before and after training on texts alone, and after
training on photos with captions for as many steps.

    python benchmarks/claim.py BASE DATA OUT [--seeds 3] [--only text-retrieval-0]...

BASE is the folder that training/e5v-tiny-base.toml's run wrote as its model. Every run lies in OUT with what was found after
it, and is not done again. `--only` does some of the runs; the table has all that lie there. Writes
benchmarks/results/claim.json and prints its table.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from machine import save
from PIL import Image

from e5v_search.config import load_recipe
from e5v_search.evaluation.gap import modality_gap
from e5v_search.training.adapters import load_adapter
from e5v_search.training.data import load_photos
from e5v_search.training.measure import recalls, scene_recalls, sts_file, sts_spearman
from e5v_search.training.midway import Midway
from e5v_search.training.run import tune
from e5v_search.training.tuned import Tuned
from e5v_search.training.tuning import Tuning

ROOT = Path(__file__).parent.parent
TRAINED = {"text": "claim-text.toml", "image-text": "claim-image-text.toml"}
PROMPTS = {"last": "Last", "prompt": "Prompt", "retrieval": "Ours"}
PHOTOS, CAPTIONS, SCENES = 1000, 2, 60
STS_EVERY = 3  # of the pairs
FOUND = "found.json"
_BATCH = 32


@dataclass(frozen=True)
class Run:
    training: str  # "none", or a key of TRAINED
    prompts: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.training}-{self.prompts}-{self.seed}"


class Yardstick:
    """What every model is measured with: Flickr8k's test photos, every third pair of STS-B's test set, drawn scenes."""

    def __init__(self, base: Path, data: Path, out: Path) -> None:
        self.base = base
        out.mkdir(parents=True, exist_ok=True)
        self.sts = out / "sts.csv"
        pairs = sts_file(data, "test").read_text(encoding="utf-8").splitlines(keepends=True)
        self.sts.write_text("".join(pairs[::STS_EVERY]), encoding="utf-8")
        self.photos = load_photos(data / "flickr8k", "test", 224, PHOTOS)

    @cached_property
    def features(self) -> list[torch.Tensor]:
        """Visual tokens of the photos. No run here moves the vision tower or the projector: they are every model's."""
        tuned = Tuned.load(str(self.base), parts="all", device="cpu")
        tiles = [tuned.prepare(Image.fromarray(p.transpose(1, 2, 0))) for p in self.photos.pixels]
        with torch.inference_mode():
            return [f for i in range(0, len(tiles), _BATCH) for f in tuned.encoder.full_features(tiles[i : i + _BATCH])]

    def measure(self, tuned: Tuned, prompts: str) -> dict[str, float]:
        model = Midway(tuned, prompts)
        own = [captions[:CAPTIONS] for captions in self.photos.captions]
        images = self._images(tuned, prompts)
        texts = model.embed_texts([caption for captions in own for caption in captions])
        scores = texts @ images.T
        owner = np.arange(len(texts)) // CAPTIONS
        values = {f"t2i_r{k}": v for k, v in recalls(scores, [{int(i)} for i in owner]).items()}
        written = [set(range(i * CAPTIONS, (i + 1) * CAPTIONS)) for i in range(len(images))]
        values |= {f"i2t_r{k}": v for k, v in recalls(scores.T, written).items()}
        gap = modality_gap(images, texts[::CAPTIONS])
        values |= {"gap_distance": gap.distance, "gap_spread": gap.spread, "gap_accuracy": gap.accuracy}
        values["sts"] = sts_spearman(model, self.sts)
        if prompts == "retrieval":  # the other sets have no prompt for a picture with a change
            values["scene_composed_r1"] = scene_recalls(Midway(tuned), SCENES)["scene_composed_r1"]
        return values

    def _images(self, tuned: Tuned, prompts: str) -> np.ndarray:
        tuned.train(False)
        with torch.inference_mode():
            batches = [self.features[i : i + _BATCH] for i in range(0, len(self.features), _BATCH)]
            rows = torch.cat([tuned.encoder.pictures(some, prompts) for some in batches])
        out: np.ndarray = torch.nn.functional.normalize(rows, dim=-1).numpy()
        return out


def taught(recipe: Tuning, data: Path, out: Path) -> Tuned:
    """The base with what the recipe taught it."""
    tune(recipe, data, out, say=partial(print, file=sys.stderr, flush=True), device="cpu")
    tuned = Tuned.load(recipe.model, parts="all", device="cpu", lora=recipe.lora)
    load_adapter(tuned, out / "adapter")
    return tuned


def recipe_for(run: Run, base: Path) -> Tuning:
    changes = {"model": str(base), "prompts.text": run.prompts, "prompts.image": run.prompts, "seed": run.seed}
    return load_recipe(Tuning, ROOT / "training" / TRAINED[run.training], [f"{k}={json.dumps(v)}" for k, v in changes.items()])


def make(run: Run, yardstick: Yardstick, data: Path, folder: Path) -> None:
    """Do a run and write into its folder what is measured after it."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if run.training == "none":
        tuned = Tuned.load(str(yardstick.base), parts="all", device="cpu")
    else:
        tuned = taught(recipe_for(run, yardstick.base), data, folder)
    seconds = round(time.monotonic() - started, 1)
    values = yardstick.measure(tuned, run.prompts)
    print(f"{run.name}: " + " ".join(f"{k} {v:.4f}" for k, v in values.items()), file=sys.stderr, flush=True)
    (folder / FOUND).write_text(json.dumps({**asdict(run), "seconds": seconds, "found": values}, indent=2) + "\n")


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, standard deviation and number of the seeds for each kind of training and prompts."""
    rows = []
    for training in ("none", *TRAINED):
        for prompts in PROMPTS:
            several = [run["found"] for run in runs if (run["training"], run["prompts"]) == (training, prompts)]
            if several:
                values = {name: [one[name] for one in several] for name in several[0]}
                summary = {name: {"mean": mean(v), "sd": stdev(v) if len(v) > 1 else None} for name, v in values.items()}
                rows.append({"training": training, "prompts": PROMPTS[prompts], "seeds": len(several)} | summary)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page's table: shares in percent."""
    columns = {"t2i_r1": "→ image R@1", "t2i_r5": "R@5", "t2i_r10": "R@10", "i2t_r10": "→ text R@10", "sts": "STS"}
    columns["gap_distance"] = "gap"
    heads = ["training", "prompts", "seeds", *columns.values()]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["training"], row["prompts"], str(row["seeds"])]
        for name in columns:
            factor, digits = (1, 2) if name == "gap_distance" else (100, 1)
            spread = "" if row[name]["sd"] is None else f" ± {factor * row[name]['sd']:.{digits}f}"
            cells.append(f"{factor * row[name]['mean']:.{digits}f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", default=[], metavar="RUN", help="by its name, as text-retrieval-0")
    args = parser.parse_args()
    yardstick = Yardstick(args.base, args.data, args.out)
    # the prompts of the paper first: a plan that is cut short has what matters most
    plan = [Run("none", prompts, 0) for prompts in PROMPTS]
    plan += [Run(kind, prompts, seed) for prompts in reversed(PROMPTS) for seed in range(args.seeds) for kind in TRAINED]
    for run in plan:
        if not (args.out / run.name / FOUND).exists() and (not args.only or run.name in args.only):
            make(run, yardstick, args.data, args.out / run.name)
    lying = [args.out / run.name / FOUND for run in plan]
    runs = [json.loads(path.read_text()) for path in lying if path.exists()]
    rows = table(runs)
    print(markdown(rows))
    recipes = {kind: asdict(load_recipe(Tuning, ROOT / "training" / file)) for kind, file in TRAINED.items()}
    measured = {"photos": PHOTOS, "captions": CAPTIONS, "scenes": SCENES, "sts_every": STS_EVERY}
    command = "python benchmarks/claim.py BASE DATA OUT"
    print(save("claim", {"command": command, "measured": measured, "recipes": recipes, "table": rows, "runs": runs}))


if __name__ == "__main__":
    main()
