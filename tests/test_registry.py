import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import towers

from e5v_search.backbones.checkpoint import canonical
from e5v_search.backbones.known import known_models
from e5v_search.backbones.registry import E5V, TINY, choose, describe, resolve
from e5v_search.errors import ModelError, UnknownModel

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "model", "quantize"),
    [
        (None, TINY, None),
        (4 * GIB, TINY, None),
        (8 * GIB, E5V, "4bit"),
        (19.9 * GIB, E5V, "4bit"),
        (20 * GIB, E5V, None),
        (139 * GIB, E5V, None),
    ],
)
def test_auto_by_free_gpu_memory(free: float | None, model: str, quantize: str | None) -> None:
    chosen, how, line = choose(None if free is None else int(free))
    assert (chosen, how) == (model, quantize)
    assert model in line
    assert "\n" not in line


def test_the_published_model_is_pinned_to_a_whole_commit() -> None:
    revision = known_models()[E5V].revision
    assert revision is not None
    assert len(revision) == 40


@pytest.mark.parametrize(
    "published",
    [
        "language_model.model.layers.3.self_attn.q_proj.weight",  # transformers 4.41
        "model.language_model.layers.3.self_attn.q_proj.weight",  # transformers 5, whole model
        "language_model.layers.3.self_attn.q_proj.weight",  # transformers 5, base model
    ],
)
def test_tensor_names_of_every_layout(published: str) -> None:
    assert canonical(published) == "language_model.layers.3.self_attn.q_proj.weight"


def test_vision_names() -> None:
    for name in ("vision_tower.vision_model.pre_layrnorm.bias", "model.vision_tower.pre_layrnorm.bias"):
        assert canonical(name) == "vision_tower.pre_layrnorm.bias"


def test_bundled_model_is_whole() -> None:
    from e5v_search.backbones.registry import resolve

    source = resolve(TINY)
    assert source.name == TINY
    assert {"config.json", "tokenizer.json", "model.safetensors", "README.md"} <= {
        p.name for p in Path(source.folder).iterdir()
    }
    assert (source.folder / "model.safetensors").stat().st_size <= 40e6


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A model hub with one model, owner/name, whose files are those of a folder; and the names of files that were fetched."""
    import huggingface_hub.constants as constants

    folder, fetched = tmp_path / "served", list[str]()
    folder.mkdir()

    class Served(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            if path.startswith("/owner/name/resolve/"):
                name = path.split("/", 5)[5]
                body = (folder / name).read_bytes()
                if self.command == "GET":
                    fetched.append(name)
            elif "/tree/" in path:
                entries = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
                body = json.dumps(entries).encode()
            else:
                body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}).encode()
            self.send_response(200)
            headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", place)
    yield folder, fetched
    server.shutdown()
    server.server_close()


def test_what_will_be_refused_is_not_fetched(hub: tuple[Path, list[str]]) -> None:
    folder, fetched = hub
    towers.build(folder, "clip")
    (folder / "model.onnx").write_text("of no use")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    with pytest.raises(ModelError, match="holds a 'blip' model; supported: llava_next"):
        resolve("owner/name")
    assert fetched == ["config.json"]


def test_a_model_is_fetched_once(hub: tuple[Path, list[str]]) -> None:
    folder, fetched = hub
    towers.build(folder, "clip")
    (folder / "model.onnx").write_text("of no use")
    source = resolve("owner/name")
    assert (source.name, source.revision) == ("owner/name", COMMIT)
    assert (source.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "model.onnx" not in fetched
    assert len(fetched) == len(set(fetched))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("e5-v", "royokong/e5-v"),
        ("E5-V", "royokong/e5-v"),
        ("qwen3-vl-embedding-2B", "Qwen/Qwen3-VL-Embedding-2B"),
        ("e5vtiny", "e5v-tiny"),
    ],
)
def test_a_name_that_is_nearly_right(name: str, meant: str) -> None:
    for ask in (resolve, describe):
        with pytest.raises(UnknownModel, match=f"{name}': did you mean {meant}[?] All are listed by: e5v-search models"):
            ask(name)
