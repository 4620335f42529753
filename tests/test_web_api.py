"""The API: the same answers as the command line, and everything else that the page shows."""

import base64
import http.client
import io
import json
import re
import shlex
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run, write_photos
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import EVIL, SAMPLES, TEXT, Served, jpeg, nearly, serving, wait_for

import e5v_search
from e5v_search.catalog import Catalog
from e5v_search.collection import Collection
from e5v_search.collection.asking import Ask
from e5v_search.errors import QueryError, TextTooLong
from e5v_search.filters import Match, parse, quoted
from e5v_search.query import Query
from e5v_search.web.service import Service


def by_name(served: Served) -> dict[str, int]:
    """Photos of the collection: id by name."""
    items = served.get("/api/items", n=500).json["items"]
    return {Path(item["path"]).name: item["id"] for item in items if item["kind"] == "image"}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """An answer without its times."""
    return {"query": found["query"], "fingerprint": found["fingerprint"], "hits": found["hits"], "fields": sorted(found)}


ASKED: list[tuple[dict[str, Any], str]] = [
    ({"q": "a cat"}, "'a cat'"),
    ({"q": "a cat", "k": 3, "where": "kind=image"}, "'a cat' -k 3 --where kind=image"),
    (
        {"q": "a dog", "plus": "snow:0.5", "minus": ["grass", "image:1:0.3"]},
        "a dog --plus snow:0.5 --minus grass --minus image:1:0.3",
    ),
    ({"image": 1}, "--image 1"),
    ({"image": 1, "modify": "at night", "k": 2}, "--image 1 --modify 'at night' -k 2"),
    ({"image": 1, "modify": "at night", "keep_reference": "true"}, "--image 1 --modify 'at night' --keep-reference"),
    ({"image": 1, "q": "on the grass", "explain": "true", "k": 2}, "on the grass --image 1 --explain -k 2"),
    ({"q": "a cat", "threshold": 0.3, "prompts": "sts"}, "a cat --threshold 0.3 --prompts sts"),
]


@pytest.mark.parametrize(("parameters", "arguments"), ASKED, ids=str)
def test_answers_are_those_of_the_command_line(served: Served, parameters: dict[str, Any], arguments: str) -> None:
    told = run("search", *shlex.split(arguments), "--json", "--no-service", "-c", served.folder)
    found = served.get("/api/search", **parameters)
    assert found.status == 200
    assert plain(found.json) == plain(nearly(json.loads(told.stdout)))
    again = served.get("/api/search", **parameters).json
    assert plain(again) == plain(nearly(found.json))
    assert again["took_ms"]["embed"] == 0  # remembered


def test_a_picture_that_is_sent_is_known_by_its_content(served: Served) -> None:
    ids = by_name(served)
    cat = (served.folder.parent / "Pictures/2021/cat.jpg").read_bytes()
    found = served.post("/api/search", cat, k=3).json
    assert {hit["id"] for hit in found["hits"][:2]} == {ids["cat.jpg"], ids[EVIL]}
    assert found["query"] == {"image": "<picture>"}
    changed = served.post("/api/search", cat, k=20, modify="at night").json["hits"]
    assert not {ids["cat.jpg"], ids[EVIL]} & {hit["id"] for hit in changed}
    kept = served.post("/api/search", cat, k=20, modify="at night", keep_reference="true").json["hits"]
    assert {ids["cat.jpg"], ids[EVIL]} <= {hit["id"] for hit in kept}
    by_id = served.post("/api/search", None, image=ids["cat.jpg"], modify="at night", k=20).json["hits"]
    assert [hit["id"] for hit in by_id] == [hit["id"] for hit in changed]
    assert served.post("/api/search", jpeg(seed=9), k=1, where=["kind=text"]).json["hits"][0]["kind"] == "text"


@pytest.mark.parametrize(
    ("parameters", "status", "word"),
    [
        ({}, 400, "nothing to search for"),
        ({"q": "   "}, 400, "empty"),
        ({"q": "a", "modify": "b"}, 400, "not both"),
        ({"q": "a", "where": "kinds=image"}, 400, "did you mean kind"),
        ({"q": "a", "plus": "image:/etc/passwd"}, 400, "no item's id"),
        ({"q": "a", "plus": "image:99999999999999999999"}, 400, "no item's id"),
        ({"q": "a", "plus": "b:-1"}, 400, "no number above 0"),
        ({"image": 987654}, 400, "no item 987654"),
        ({"q": "a", "threshold": 2}, 400, "between -1 and 1"),
        ({"q": "a", "prompts": "nonsense"}, 400, "unknown prompt set"),
        ({"q": "a", "prompts": "/tmp/mine.toml"}, 422, "prompts"),
        ({"q": "a", "prompts": "mine.toml"}, 422, "prompts"),
        ({"q": "a", "threshold": "nan"}, 422, "threshold"),
        ({"image": "/etc/passwd"}, 422, "image"),
        ({"q": "a", "k": 0}, 422, "k"),
        ({"q": "a", "k": 5000}, 422, "k"),
        ({"q": "a", "treshold": 0.5}, 422, "treshold"),
        ({"q": "a" * 9000}, 422, "q"),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_said(served: Served, parameters: dict[str, Any], status: int, word: str) -> None:
    for answer in (served.get("/api/search", **parameters), served.post("/api/search", **parameters)):
        assert answer.status == status, answer.body
        assert word in answer.json["error"]
        assert "\n" not in answer.json["error"]


def test_one_bad_question_takes_no_other_with_it(gallery: Path) -> None:
    long = "word " * 20_000
    with Collection.open(gallery) as source:
        asks = [Ask(Query("a cat"), k=2), Ask(Query(long)), Ask(Query("a dog", where=("x",))), Ask(Query(image=1), k=2)]
        answers = source.answer_all(asks)
        alone = source.answer(Query("a cat"), k=2)
    assert isinstance(answers[1], TextTooLong)
    assert isinstance(answers[2], QueryError)
    assert [hit.id for hit in answers[0]] == [hit.id for hit in alone]
    assert answers[3][0].id == 1


def test_many_who_ask_at_once_are_answered_in_batches(served: Served) -> None:
    texts = [f"a photo number {n}" for n in range(40)]
    found: dict[str, Any] = {}

    def ask(text: str) -> None:
        found[text] = served.get("/api/search", q=text, k=3).json

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    before = counts(served)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = counts(served)
    assert all(found[text]["query"] == {"text": text} for text in texts)
    questions = after["e5v_search_batched_questions_total"] - before.get("e5v_search_batched_questions_total", 0)
    assert questions == 40
    assert after["e5v_search_batches_total"] - before.get("e5v_search_batches_total", 0) < 40
    with Collection.open(served.folder) as source:
        for text in texts[:5]:
            assert [hit["id"] for hit in found[text]["hits"]] == [hit.id for hit in source.search(text, k=3)]


def counts(served: Served) -> dict[str, float]:
    lines = served.get("/metrics").body.decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    served.get("/api/search", q="a cat")
    answer = served.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.body.endswith(b"\n")
    types: dict[str, str] = {}
    seen: set[str] = set()
    for line in answer.body.decode().splitlines():
        if declared := re.fullmatch(r"# TYPE ([a-z_][a-z0-9_]*) (counter|gauge|histogram)", line):
            assert declared[1] not in types  # once, and before its samples
            types[declared[1]] = declared[2]
            continue
        sample = re.fullmatch(r'([a-z_][a-z0-9_]*)(\{[a-z]+="[^"\\]*"(?:,[a-z]+="[^"\\]*")*\})? (\S+)', line)
        assert sample, line
        assert float(sample[3]) >= 0
        assert line.rsplit(" ", 1)[0] not in seen
        seen.add(line.rsplit(" ", 1)[0])
        name = sample[1] if sample[1] in types else re.sub("_(bucket|sum|count)$", "", sample[1])
        assert (types[name] == "counter") == name.endswith("_total"), line
    assert {"counter", "gauge", "histogram"} == set(types.values())


def test_metrics_count_requests(served: Served) -> None:
    name = 'e5v_search_requests_total{route="/api/search",status="400"}'
    before = counts(served).get(name, 0)
    served.get("/api/search")
    after = counts(served)
    assert after[name] == before + 1
    buckets = [value for key, value in after.items() if key.startswith('e5v_search_request_seconds_bucket{route="/api/search"')]
    assert buckets == sorted(buckets)
    assert buckets[-1] == after['e5v_search_request_seconds_count{route="/api/search"}']
    assert served.get("/healthz").json == {"status": "ok"}


def test_the_collection_is_listed_newest_first(served: Served) -> None:
    whole = served.get("/api/items", n=500).json
    assert whole["total"] == len(whole["items"]) == 14
    dates = [item["taken_at"] or "" for item in whole["items"]]
    assert dates == sorted(dates, reverse=True)
    parts = [served.get("/api/items", start=start, n=5).json["items"] for start in (0, 5, 10, 15)]
    assert [item for part in parts for item in part] == whole["items"]
    filtered = served.get("/api/items", where=["kind=image", "taken=2019"], n=3).json
    expected = [item for item in whole["items"] if (item["taken_at"] or "").startswith("2019")]
    assert (filtered["total"], filtered["items"]) == (len(expected), expected[:3])
    assert served.get("/api/items", where="kin=image").status == 400


def test_facets_count_what_passes_and_their_filters_pass_as_many(served: Served) -> None:
    found = served.get("/api/facets").json
    assert found["total"] == 14
    assert {facet["value"]: facet["count"] for facet in found["kind"]} == {"image": 10, "text": 2, "rendered": 2}
    assert {year["value"]: year["count"] for year in found["taken"]} == {"2021": 5, "2019": 4}
    assert {facet["value"]: facet["count"] for facet in found["camera"]} == {"Apple iPhone 12": 5, "Canon EOS 80D": 4}
    assert sorted(place["count"] for place in found["place"]) == [4, 5]
    months = [month for year in found["taken"] for month in year["months"]]
    every = [*found["kind"], *found["taken"], *months, *found["folder"], *found["camera"], *found["format"], *found["place"]]
    assert any("(spring)" in facet.get("value", "") for facet in every)
    for facet in every:
        assert served.get("/api/items", where=facet["where"], n=1).json["total"] == facet["count"], facet
    narrowed = served.get("/api/facets", where=["taken=2019", "kind=image"]).json
    assert [facet["value"] for facet in narrowed["camera"]] == ["Canon EOS 80D"]
    assert narrowed["total"] == 4


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_quoted_values_pass_themselves_alone(value: str) -> None:
    leaf = parse([f"text={quoted(value)}"])
    assert isinstance(leaf, Match)
    pattern = re.compile(leaf.regex, re.DOTALL)
    assert pattern.match(value)
    assert not pattern.match(value + "x")
    assert not pattern.match("x" + value)


def test_one_item_with_its_pictures_words_and_copies(served: Served) -> None:
    ids = by_name(served)
    cat = served.get(f"/api/items/{ids['cat.jpg']}").json
    assert (cat["camera"], cat["taken_at"], cat["format"]) == ("Apple iPhone 12", "2021-01-11T10:00:00", "JPEG")
    assert cat["bytes"] == (served.folder.parent / "Pictures/2021/cat.jpg").stat().st_size
    assert cat["available"]
    photo_of = served.get(f"/api/items/{cat['id']}/image")
    assert photo_of.headers["content-type"] == "image/jpeg"
    assert photo_of.body == (served.folder.parent / "Pictures/2021/cat.jpg").read_bytes()
    small = served.get(f"/api/items/{cat['id']}/thumbnail", size=200)
    assert small.headers["content-type"] == "image/jpeg"
    assert max(size(small.body)) == 256
    again = served.get(f"/api/items/{cat['id']}/thumbnail", {"If-None-Match": small.headers["etag"]}, size=200)
    assert (again.status, again.body) == (304, b"")
    words = served.get(f"/api/items/{cat['id']}/words", k=4).json["words"]
    told = json.loads(run("explain", str(cat["id"]), "-k", "4", "--json", "-c", served.folder).stdout)["words"]
    assert [word["text"] for word in words] == [word["text"] for word in told]
    same = {item["id"]: item["exact"] for item in served.get(f"/api/items/{cat['id']}/copies").json["items"]}
    assert same == {ids[EVIL]: True, ids["cat again.jpg"]: False}
    assert served.get(f"/api/items/{ids['coffee.jpg']}/copies").json["items"] == []
    rendered = served.get("/api/items", where="kind=rendered").json["items"][0]
    assert size(served.get(f"/api/items/{rendered['id']}/thumbnail").body) == (512, 256)
    text = served.get("/api/items", where="kind=text and text~snow").json["items"][0]
    assert text["text"] == TEXT
    assert size(served.get(f"/api/items/{text['id']}/thumbnail").body) == (512, 256)
    assert served.get(f"/api/items/{text['id']}/image").status == 400
    for path in ("/api/items/99999", "/api/items/99999/words", "/api/items/99999/thumbnail", "/api/items/99999/copies"):
        assert served.get(path).status == 404


def size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.size


def test_status_failures_and_map(served: Served) -> None:
    told = json.loads(run("status", "--json", "-c", served.folder).stdout)
    found = served.get("/api/status").json
    assert {**found, "bytes": 0} == {**told, "bytes": 0}
    [failed] = served.get("/api/failures").json["failed"]
    assert failed["path"].endswith("broken.jpg")
    assert "truncated" in failed["reason"]
    points = served.get("/api/map").json
    ids = np.frombuffer(base64.b64decode(points["ids"]), "<i8")
    assert sorted(ids.tolist()) == sorted(item["id"] for item in served.get("/api/items", n=500).json["items"])
    xy = np.frombuffer(base64.b64decode(points["xy"]), "<f4").reshape(-1, 2)
    assert len(xy) == len(ids) == points["of"]
    places = dict(zip(ids.tolist(), xy, strict=True))
    names = by_name(served)
    assert np.allclose(places[names["cat.jpg"]], places[names[EVIL]])


@pytest.fixture
def own(gallery: Path, tmp_path: Path) -> Path:
    """A copy of the collection, to be changed."""
    shutil.copytree(gallery, tmp_path / "own", ignore=shutil.ignore_patterns("*.sock"))
    return tmp_path / "own"


def test_what_is_indexed_or_forgotten_meanwhile_is_in_the_results(own: Path, tmp_path: Path) -> None:
    with serving(own) as served, serving(own) as other:
        for each in (served, other):
            assert each.get("/api/search", q="a cat", k=50).json["hits"]
            assert each.get("/api/facets").json["total"] == 14
        [path] = write_photos(tmp_path / "more", 1, first=77)
        run("index", path, "-c", own, "--quiet")
        for each in (served, other):
            assert each.get("/api/items", n=1).json["total"] == 15
            assert each.get("/api/facets").json["total"] == 15
            assert str(path) in [hit["path"] for hit in each.get("/api/search", q="a cat", k=50).json["hits"]]
            assert each.post("/api/search", path.read_bytes(), k=1).json["hits"][0]["path"] == str(path)
        run("forget", path, "-c", own)
        for each in (served, other):
            assert str(path) not in [hit["path"] for hit in each.get("/api/search", q="a cat", k=50).json["hits"]]


def test_another_collection_in_the_same_place_is_noticed(own: Path, tmp_path: Path) -> None:
    with serving(own) as served:
        assert len(served.get("/api/search", q="a cat", k=50).json["hits"]) == 14
        events = listen(served)
        before = next(events)["version"]
        own.rename(tmp_path / "away")
        assert served.get("/api/search", q="a cat").status == 503
        assert served.get("/api/items").status == 503
        assert "e5v_search_uploads 0" in served.get("/metrics").body.decode()
        assert next(events)["version"] == "gone"
        run("index", *write_photos(tmp_path / "new", 2), "-c", own, "--quiet")
        assert next(events)["version"] not in (before, "gone")
        events.close()
        assert len(served.get("/api/search", q="a cat", k=50).json["hits"]) == 2
        assert served.get("/api/items").json["total"] == 2
        (own / "catalog.sqlite").unlink()
        (own / "catalog.sqlite").write_bytes(b"no database at all" * 100)
        for suffix in ("-wal", "-shm"):
            (own / f"catalog.sqlite{suffix}").unlink(missing_ok=True)
        answer = served.get("/api/search", q="a cat")
        assert (answer.status, answer.json["kind"]) == (503, "CatalogDamaged")
        assert served.get("/healthz").status == 200


def test_an_empty_collection_and_one_of_a_model_that_is_not_known(own: Path, tmp_path: Path) -> None:
    with Collection.open(tmp_path / "empty"), serving(tmp_path / "empty") as served:
        assert served.get("/api/search", q="a cat").json["kind"] == "CollectionNotFound"
        assert served.get("/api/items").json == {"total": 0, "start": 0, "items": []}
        assert served.get("/api/facets").json["total"] == 0
        assert served.get("/api/map").json["ids"] == ""
    with sqlite3.connect(own / "catalog.sqlite") as db:
        db.execute("UPDATE meta SET value = 'unknown' WHERE key = 'fingerprint'")
    with serving(own) as served:
        assert served.get("/api/search", image=1, k=1).json["hits"][0]["id"] == 1
        assert served.get("/api/search", q="a cat").status == 409


def test_an_index_run_is_started_and_told(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    write_photos(folder, 3)
    run("index", folder, "-c", own, "--quiet")
    write_photos(folder, 5)
    with serving(own) as served:
        assert served.ask("POST", "/api/index").status == 400
        assert served.get("/api/index").json["allowed"] is False
    with serving(own, allow_index=True) as served:
        events = listen(served)
        assert next(events)["run"]["running"] is False
        assert served.ask("POST", "/api/index").status == 202
        told = [next(events)]
        while told[-1]["run"]["running"]:
            told.append(next(events))
        assert told[-1]["run"]["added"] == 2
        assert told[-1]["run"]["failed"] == 1
        assert told[-1]["run"]["error"] is None
        assert wait_for(lambda: served.get("/api/items", n=1).json["total"] == 19)
        events.close()


def test_the_model_does_one_thing_at_a_time(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "more", 2)
    run("index", tmp_path / "more", "-c", own, "--quiet")
    write_photos(tmp_path / "more", 8)
    with serving(own, allow_index=True) as served:
        assert served.get("/api/search", q="a cat").status == 200
        embedder = served.server.service.engine._embedder
        inside, most, called = [0], [0], []

        def alone(name: str, real: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                called.append(name)
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                try:
                    return real(*args, **options)
                finally:
                    inside[0] -= 1

            return call

        for name in ("embed_texts", "embed_images", "embed_prepared", "embed_views"):
            monkeypatch.setattr(embedder, name, alone(name, getattr(type(embedder), name).__get__(embedder)))
        assert served.ask("POST", "/api/index").status == 202
        asking = [
            threading.Thread(target=served.get, args=("/api/search",), kwargs={"q": f"a photo of number {n}"}) for n in range(8)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        wait_for(lambda: not served.get("/api/index").json["running"])
        assert served.get("/api/index").json["added"] == 6
        assert "embed_texts" in called
        assert len(set(called)) > 1  # questions and photos
        assert most == [1]


def listen(served: Served) -> Iterator[Any]:
    connection = http.client.HTTPConnection(served.host, timeout=60)
    connection.request("GET", "/api/events")
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    try:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        connection.close()


def test_the_api_is_described(served: Served) -> None:
    described = served.get("/openapi.json").json
    assert {"/api/search", "/api/items", "/api/items/{id}", "/api/status", "/healthz", "/metrics"} <= set(described["paths"])
    form_fields = described["paths"]["/api/search"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form_fields["properties"]["image"]["format"] == "binary"
    assert {"q", "modify", "minus", "where", "k"} <= set(form_fields["properties"])


def test_land_on_the_map_of_places_is_that_of_the_sample() -> None:
    with Image.open(SAMPLES / "world-map.jpg") as image:
        red, _, blue = np.asarray(image.convert("RGB").resize((144, 72), Image.Resampling.BOX), int).transpose(2, 0, 1)
    script = (Path(e5v_search.__file__).parent / "web/page/world.js").read_text(encoding="utf-8")
    land = base64.b64decode("".join(re.findall(r'^  "([A-Za-z0-9+/=]+)",$', script, re.MULTILINE)))
    assert land == np.packbits(blue - red < 40).tobytes()


def test_answers_are_forgotten_when_there_are_too_many() -> None:
    from e5v_search.hits import Hits
    from e5v_search.web.memory import Answers

    answers = Answers(limit=1000)
    for n in range(50):
        answers.put(n, Hits([], {"text": "x" * 100}, "f", {}))
    assert answers.get(0, 0.0) is None
    assert answers.get(49, 0.0) is not None
    assert sum(answers.get(n, 0.0) is not None for n in range(50)) < 10


def test_pages_of_a_filter_are_exact(gallery: Path) -> None:
    from e5v_search.config import ModelChoice

    service = Service(gallery, ModelChoice())
    with Catalog.open(gallery, readonly=True) as catalog:
        every = {item.id: item for item in catalog.items(range(1, 100)).values()}
        for where in (["kind=image"], ["folder=2021"], ["not has taken"], ["kind=text|rendered", "text~moon"]):
            total, _ = service.page(catalog, where, 0, 1)
            found = [item.id for start in range(0, total, 2) for item in service.page(catalog, where, start, 2)[1]]
            assert sorted(found) == sorted(catalog.select(parse(where)).tolist())
            keys = [(every[i].taken_at or "", i) for i in found]
            assert keys == sorted(keys, reverse=True)
    service.stop()
