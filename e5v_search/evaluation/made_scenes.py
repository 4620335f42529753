"""A benchmark that needs no downloads: drawn scenes, all four of the paper's task types with real pixels, from a seed."""

import random
from functools import partial

from PIL import Image

from e5v_search.evaluation.records import Caption, Captioned, Change, Composed, Drawn, Loaded, Pair, Rating, Scenes
from e5v_search.scenes import Scene, draw, random_change, random_scene

SCENES = 300
SEED = "e5v-search scenes 1"  # another text is another benchmark


def scenes(n: int = SCENES, seed: str = SEED) -> Loaded:
    """n scenes with a caption each; a change to each, whose outcome is one more picture; 3n pairs of rated captions.

    No two pictures show the same. Pairs are rated from 0 to 5 by what both captions say: `shared`.
    """
    rng = random.Random(seed)
    before: dict[object, Scene] = {}
    while len(before) < n:
        scene = random_scene(rng)
        before.setdefault(scene.facts, scene)
    shown, changes, after = set(before), [], []
    for i, scene in enumerate(before.values()):
        text, changed = random_change(scene, rng)
        while changed.facts in shown:
            text, changed = random_change(scene, rng)
        shown.add(changed.facts)
        changes.append(Change(str(i), i, (text,), target=n + i))
        after.append(changed)
    plain = list(before.values())
    pictures = tuple(Drawn(f"scene {i}", partial(_drawn, scene, f"{seed} {i}")) for i, scene in enumerate([*plain, *after]))
    captions = tuple(Caption(scene.caption(rng), (i,)) for i, scene in enumerate(plain))
    others = (plain, after, rng.sample(plain, n))
    pairs = [
        Pair(scene.caption(rng), other.caption(rng), shared(scene, other))
        for scene, *with_it in zip(plain, *others, strict=True)
        for other in with_it
    ]
    data = Scenes(Captioned(pictures[:n], captions), Composed(pictures, tuple(changes)), Rating({"sts": tuple(pairs)}))
    return Loaded(data, "drawn", f"seed {seed!r}")


def shared(a: Scene, b: Scene) -> float:
    """5 times the share of what two scenes show that they both show: the background, each group's shape, colour and count,
    and where the groups stand."""
    in_a, in_b = _said(a), _said(b)
    return 5 * len(in_a & in_b) / len(in_a | in_b)


def _said(scene: Scene) -> set[object]:
    said: set[object] = {("background", scene.background)}
    for i, group in enumerate(sorted(scene.groups, key=lambda group: (group.shape, group.colour, group.count))):
        said |= {(i, "shape", group.shape), (i, "colour", group.colour), (i, "count", group.count)}
    return said | ({("place", scene.facts[0])} if scene.relation is not None else set())


def _drawn(scene: Scene, seed: str) -> Image.Image:
    return draw(scene, random.Random(seed))
