"""Pictures whose meaning is known exactly: coloured shapes, how many, where, and what a change makes of them.

A scene is a value; its captions, its drawing and its changes follow from it and a random generator, so that the same
seed gives the same scene everywhere. What a caption says is true of the drawing, and `Scene.facts` is what is drawn.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "orange": (250, 135, 20),
    "purple": (140, 60, 170),
    "pink": (250, 150, 190),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (150, 150, 150), "brown": (120, 80, 50), "light blue": (185, 220, 245)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}

_Fill = int | tuple[int, int, int]
Relation = Literal["left", "right", "above", "below"]
RELATIONS: dict[Relation, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Group:
    """`count` equal shapes of one colour."""

    shape: str
    colour: str
    count: int = 1

    def noun(self) -> str:
        if self.count == 1:
            return f"{self.colour} {self.shape}"
        plural = self.shape + ("es" if self.shape == "cross" else "s")
        return f"{self.colour} {plural}"

    def phrase(self) -> str:
        article = "an" if self.count == 1 and self.colour == "orange" else COUNTS[self.count]
        return f"{article} {self.noun()}"


@dataclass(frozen=True)
class Scene:
    """One group, or two that stand in a relation: the first is `relation` (of) the second."""

    groups: tuple[Group, ...]
    background: str = "white"
    relation: Relation | None = None

    @property
    def facts(self) -> tuple[frozenset[tuple[Group, str]], str]:
        """Equal exactly when two scenes show the same: "a left of b" is "b right of a"."""
        if self.relation is None:
            return frozenset({(self.groups[0], "")}), self.background
        first, second = self.groups
        return frozenset({(first, self.relation), (second, OPPOSITE[self.relation])}), self.background

    def caption(self, rng: random.Random) -> str:
        groups, relation = self.groups, self.relation
        if relation is not None and rng.random() < 0.5:
            groups, relation = groups[::-1], OPPOSITE[relation]
        text = groups[0].phrase()
        if relation is not None:
            text += f" {rng.choice(RELATIONS[relation])} {groups[1].phrase()}"
        template = rng.choice(("{} on a {} background", "a picture of {} on {}", "{}, {} background", "a {1} picture with {0}"))
        return template.format(text, self.background)


def random_scene(rng: random.Random) -> Scene:
    background = rng.choice(list(BACKGROUNDS))
    first = _random_group(rng)
    if rng.random() < 0.4:
        return Scene((replace(first, count=rng.randint(1, 4)),), background)
    second = _random_group(rng)
    while second == first:
        second = _random_group(rng)
    return Scene((first, second), background, rng.choice(list(RELATIONS)))


def _random_group(rng: random.Random) -> Group:
    return Group(rng.choice(SHAPES), rng.choice(list(COLOURS)))


def random_change(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A sentence that asks for a change, and the scene after it, which always shows something else."""
    kinds: list[Callable[[Scene, random.Random], tuple[str, Scene]]] = [_recolour, _reshape, _new_background]
    kinds += [_recount, _add] if scene.relation is None else [_remove, _swap]
    while True:
        text, changed = rng.choice(kinds)(scene, rng)
        distinct = len(set(changed.groups)) == len(changed.groups)
        if distinct and changed.facts != scene.facts:
            return text, changed


def _with_group(scene: Scene, i: int, group: Group) -> Scene:
    return replace(scene, groups=tuple(group if j == i else g for j, g in enumerate(scene.groups)))


def _recolour(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    i, colour = rng.randrange(len(scene.groups)), rng.choice(list(COLOURS))
    group = scene.groups[i]
    text = rng.choice((f"change the {group.noun()} to {colour}", f"make the {group.noun()} {colour}"))
    return text, _with_group(scene, i, replace(group, colour=colour))


def _reshape(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    i, shape = rng.randrange(len(scene.groups)), rng.choice(SHAPES)
    group = scene.groups[i]
    changed = replace(group, shape=shape)
    what = changed.phrase() if group.count == 1 else changed.noun()
    text = rng.choice((f"turn the {group.noun()} into {what}", f"replace the {group.noun()} with {what}"))
    return text, _with_group(scene, i, changed)


def _recount(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    changed = replace(scene.groups[0], count=rng.randint(1, 4))
    number = "one" if changed.count == 1 else COUNTS[changed.count]
    text = rng.choice((f"show {number} instead", f"make it {number} {changed.noun()}"))
    return text, replace(scene, groups=(changed,))


def _add(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    # Beside several equal shapes there is no room: an added group makes the first a single one.
    old, new, relation = replace(scene.groups[0], count=1), _random_group(rng), rng.choice(list(RELATIONS))
    if scene.groups[0].count > 1:
        text = f"keep one {old.noun()} and add {new.phrase()} {rng.choice(RELATIONS[relation])} it"
    else:
        text = f"add {new.phrase()} {rng.choice(RELATIONS[relation])} it"
    return text, Scene((new, old), scene.background, relation)


def _remove(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    i = rng.randrange(2)
    text = rng.choice((f"remove the {scene.groups[i].noun()}", f"take away the {scene.groups[i].noun()}"))
    return text, Scene((scene.groups[1 - i],), scene.background)


def _swap(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    assert scene.relation is not None
    first, second = scene.groups
    relation = rng.choice(list(RELATIONS))
    text = f"move the {first.noun()} {rng.choice(RELATIONS[relation])} the {second.noun()}"
    return text, replace(scene, relation=relation)


def _new_background(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    background = rng.choice(list(BACKGROUNDS))
    text = rng.choice((f"make the background {background}", f"put it on {background}"))
    return text, replace(scene, background=background)


def draw(scene: Scene, rng: random.Random, size: tuple[int, int] = (224, 224)) -> Image.Image:
    """The scene as an RGB picture of `size` (height, width); where and how large each shape is, is up to chance.

    A single large shape may be cut by the edge, as things in photos are.
    """
    fills = [COLOURS[group.colour] for group in scene.groups]
    return _painted("RGB", BACKGROUNDS[scene.background], fills, scene, rng, size)


def outline(scene: Scene, rng: random.Random, size: tuple[int, int] = (224, 224)) -> Image.Image:
    """What `draw` covers with what, given a generator in the same state: a picture of mode L with 0 for the background and
    i + 1 where a shape of the scene's group i lies."""
    return _painted("L", 0, range(1, 1 + len(scene.groups)), scene, rng, size)


def _painted(
    mode: str, ground: _Fill, fills: Sequence[_Fill], scene: Scene, rng: random.Random, size: tuple[int, int]
) -> Image.Image:
    height, width = size
    image = Image.new(mode, (width, height), ground)
    pen = ImageDraw.Draw(image)
    if scene.relation is None:
        group = scene.groups[0]
        radius = min(size) * rng.uniform(0.1, 0.15) * (1.6 if group.count == 1 else 1.0)
        cells = rng.sample([(x, y) for x in (-0.5, 0.5) for y in (-0.5, 0.5)], group.count)
        shift = (rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12))
        for x, y in cells:
            _shape(pen, fills[0], group.shape, *_centre(x + shift[0], y + shift[1], size, rng), radius)
        return image
    axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[scene.relation]
    across = rng.uniform(-0.35, 0.35)
    for group, fill, side in zip(scene.groups, fills, (sign, -sign), strict=True):
        along = side * rng.uniform(0.42, 0.55)
        drift = across + rng.uniform(-0.15, 0.15)
        x, y = (along, drift) if axis == 0 else (drift, along)
        _shape(pen, fill, group.shape, *_centre(x, y, size, rng), min(size) * rng.uniform(0.12, 0.19))
    return image


def _centre(x: float, y: float, size: tuple[int, int], rng: random.Random) -> tuple[float, float]:
    """Pixel position of a point of the square [-1, 1]², a little off."""
    return (
        size[1] * (0.5 + 0.5 * (x + rng.uniform(-0.06, 0.06))),
        size[0] * (0.5 + 0.5 * (y + rng.uniform(-0.06, 0.06))),
    )


def _shape(pen: ImageDraw.ImageDraw, fill: _Fill, shape: str, x: float, y: float, r: float) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill=fill)
    elif shape == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=max(2, round(0.38 * r)))
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
    else:
        corners, inner = (3, 1.0) if shape == "triangle" else (10, 0.42)
        radii = [r * (inner if i % 2 else 1.0) for i in range(corners)]
        turn = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
        pen.polygon([(x + s * math.cos(a), y + s * math.sin(a)) for s, a in zip(radii, turn, strict=True)], fill=fill)
