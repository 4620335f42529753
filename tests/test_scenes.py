import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label

from e5v_search.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Group,
    Scene,
    draw,
    outline,
    random_change,
    random_scene,
)

SEEDS = st.integers(0, 10**9)
NUMBERS = {"a": 1, "an": 1, "one": 1} | {word: n for n, word in COUNTS.items()}


def read_group(words: str) -> Group:
    number, colour, shape = words.split()
    singular = next(s for s in SHAPES if shape in (s, s + "s", s + "es"))
    return Group(singular, colour, NUMBERS[number])


def read_caption(caption: str) -> Scene:
    """A caption's meaning, found without the code that wrote it."""
    background = next(b for b in BACKGROUNDS if re.search(rf"\b{b}( background| picture)|on {b}$", caption))
    text = re.sub(rf"^a picture of |^a {background} picture with ", "", caption)
    text = re.sub(rf"( on a|,) {background} background$| on {background}$", "", text)
    for relation, phrases in RELATIONS.items():
        for phrase in phrases:
            first, found, second = text.partition(f" {phrase} ")
            if found:
                return Scene((read_group(first), read_group(second)), background, relation)
    return Scene((read_group(text),), background)


@given(SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_caption_says_what_the_scene_is(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    assert read_caption(scene.caption(rng)).facts == scene.facts


@given(SEEDS, st.sampled_from([(224, 224), (149, 224), (224, 168)]))
@settings(max_examples=60, deadline=None)
def test_the_drawing_shows_what_the_scene_is(seed: int, size: tuple[int, int]) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    pixels = np.asarray(draw(scene, rng, size))
    assert pixels.shape == (*size, 3)
    centres = []
    for group in scene.groups:
        mask = (pixels == COLOURS[group.colour]).all(axis=2)
        assert mask.any()
        if scene.relation or group.count > 1:  # a large single shape may be cut by the edge, as in a photo
            assert not np.concatenate((mask[0], mask[-1], mask[:, 0], mask[:, -1])).any()
        centres.append([float(c.mean()) for c in np.nonzero(mask)])
    if scene.relation is None:
        _, connected = label(mask, structure=np.ones((3, 3)))
        assert connected == scene.groups[0].count
    elif scene.groups[0].colour != scene.groups[1].colour:
        (row_a, col_a), (row_b, col_b) = centres
        truth = {"left": col_a < col_b, "right": col_a > col_b, "above": row_a < row_b, "below": row_a > row_b}
        assert truth[scene.relation]


@given(SEEDS, st.sampled_from([(224, 224), (149, 224), (224, 168)]))
@settings(max_examples=60, deadline=None)
def test_an_outline_tells_which_group_covers_each_pixel(seed: int, size: tuple[int, int]) -> None:
    scene = random_scene(random.Random(seed))
    marks = np.asarray(outline(scene, random.Random(seed + 1), size))
    fills = [BACKGROUNDS[scene.background], *(COLOURS[group.colour] for group in scene.groups)]
    np.testing.assert_array_equal(np.asarray(draw(scene, random.Random(seed + 1), size)), np.array(fills)[marks])
    assert set(np.unique(marks)) == set(range(len(fills)))


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_a_change_gives_the_scene_that_it_asks_for(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    text, changed = random_change(scene, rng)
    assert changed.facts != scene.facts
    nouns = {group.noun(): group for group in scene.groups}
    if found := re.match(r"(?:change|make) the (.+?) (?:to )?(\w+)$", text):
        what, colour = found.groups()
        if what in nouns:
            assert {g.colour for g in changed.groups if g.shape == nouns[what].shape} >= {colour}
            return
    if found := re.match(r"(?:turn|replace) the (.+) (?:into|with) (.+)$", text):
        assert any(found[2].endswith(group.noun()) for group in changed.groups)
    elif found := re.match(r"(?:remove|take away) the (.+)$", text):
        assert changed.groups == tuple(g for g in scene.groups if g.noun() != found[1])
    elif found := re.match(r"(?:make the background|put it on) (.+)$", text):
        assert (changed.background, changed.groups) == (found[1], scene.groups)
    elif found := re.match(r"(?:show|make it) (\w+)", text):
        assert changed.groups[0].count == NUMBERS[found[1]]
    elif text.startswith("move the "):
        assert changed.groups == scene.groups
        assert any(phrase in text for phrase in RELATIONS[changed.relation])  # type: ignore[index]
    else:
        assert re.match(r"(keep one .+ and )?add an? ", text)
        assert changed.groups[0].phrase() in text
        assert len(changed.groups) == 2


def test_one_seed_gives_one_scene_one_caption_one_drawing() -> None:
    def make(seed: int) -> tuple[Scene, str, tuple[str, Scene], bytes]:
        rng = random.Random(seed)
        scene = random_scene(rng)
        return scene, scene.caption(rng), random_change(scene, rng), draw(scene, rng).tobytes()

    assert make(5) == make(5)
    assert make(5) != make(6)


@pytest.mark.parametrize("relation", list(RELATIONS))
def test_two_sides_of_a_relation_are_one_fact(relation: str) -> None:
    a, b = Group("circle", "red"), Group("square", "blue")
    other = OPPOSITE[relation]  # type: ignore[index]
    assert Scene((a, b), "white", relation).facts == Scene((b, a), "white", other).facts  # type: ignore[arg-type]
    assert Scene((a, b), "white", relation).facts != Scene((a, b), "white", other).facts  # type: ignore[arg-type]
