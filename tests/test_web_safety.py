"""What the service refuses: foreign pages, hosts and users, too much, and whatever is no photo."""

import os
import shutil
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run, start, write_photos
from pictures import encoded, png_header, write_bad
from PIL import Image
from serving import Served, form, jpeg, serving, wait_for

from e5v_search.collection import Collection
from e5v_search.errors import ServiceBusy
from e5v_search.web import connections, safety, uploads
from e5v_search.web.engine import SHARE
from e5v_search.web.safety import Access
from e5v_search.web.turns import Turns, Turnstile

TOKEN = "a-token-that-nobody-guesses"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8765"},
        {"Host": "192.0.2.7"},
        {"Host": ""},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    ],
    ids=str,
)
def test_other_sites_and_names_are_refused(served: Served, headers: dict[str, str]) -> None:
    for path in ("/", "/api/search?q=a", "/api/items/1/image", "/api/items/1/thumbnail", "/metrics", "/openapi.json"):
        answer = served.get(path, headers)
        assert answer.status == 403, (path, headers)
        assert answer.json["kind"] == "Refused"
    body, kind = form(jpeg())
    assert served.ask("POST", "/api/search", body, {"Content-Type": kind, **headers}).status == 403


def test_our_own_page_and_a_link_to_it_pass(served: Served) -> None:
    own = {"Origin": served.address, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert served.get("/api/search?q=a", own).status == 200
    assert served.get("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 200
    port = served.host.rpartition(":")[2]
    for name in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]"):
        assert served.get("/healthz", {"Host": f"{name}:{port}"}).status == 200


def test_two_hosts_in_one_request_are_refused(served: Served) -> None:
    host, _, port = served.host.partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: {served.host}\r\nHost: evil.example\r\n\r\n".encode())
        assert connection.recv(100).split()[1] in (b"400", b"403")


def test_every_answer_has_the_policy(served: Served) -> None:
    for path in ("/", "/main.js", "/api/status", "/api/items/1/thumbnail", "/api/nothing", "/api/search"):
        headers = served.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


@pytest.mark.parametrize(
    "path",
    [
        "/api/items/../../../../etc/passwd/image",
        "/api/items/%2e%2e%2f%2e%2e%2fetc%2fpasswd/image",
        "/api/items//etc/passwd/image",
        "/api/items/-1/image",
        "/api/items/1.5/image",
        "/api/items/99999999999999999999999/image",
        "/page/../../../etc/passwd",
        "/../main.js",
        "/static/..%2f..%2f..%2fetc%2fpasswd",
        "/..%5c..%5cetc%5cpasswd",
    ],
)
def test_photos_are_had_by_id_and_never_by_path(served: Served, path: str) -> None:
    answer = served.get(path)
    assert answer.status in (404, 422)
    assert b"root:" not in answer.body


def test_what_takes_the_place_of_a_photo_is_not_given_out(tmp_path: Path) -> None:
    [one, two, three] = write_photos(tmp_path / "photos", 3)
    run("index", tmp_path / "photos", "-c", tmp_path / "c", "--quiet")
    with serving(tmp_path / "c") as served:
        ids = {item["path"]: item["id"] for item in served.get("/api/items").json["items"]}
        one.unlink()
        one.symlink_to("/etc/passwd")
        two.unlink()
        os.mkfifo(two)
        three.write_text("<script>alert(1)</script>")
        for path in (one, two, three):
            for what in ("image", "thumbnail"):
                answer = served.get(f"/api/items/{ids[str(path)]}/{what}")
                assert answer.status in (404, 415), (path, what)
                assert b"root:" not in answer.body
                assert b"<script>" not in answer.body
            assert served.get(f"/api/items/{ids[str(path)]}").status == 200


def test_bad_and_huge_pictures_are_refused(served: Served, tmp_path: Path) -> None:
    for path, word in write_bad(tmp_path).items():
        answer = served.post("/api/search", path.read_bytes())
        assert answer.status == (413 if path.name == "huge.png" else 415), path
        assert word in answer.json["error"]
    bomb = png_header(9000, 9000)
    assert uploads.MAX_PIXELS < 9000 * 9000
    answer = served.post("/api/search", bomb)
    assert (answer.status, answer.json["kind"]) == (413, "PictureTooLarge")


def test_large_bodies_are_refused_before_they_are_read(served: Served) -> None:
    host, _, port = served.host.partition(":")
    head = f"POST /api/search HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {safety.MAX_BODY + 1}\r\n\r\n".encode())
        assert connection.recv(200).split()[1] == b"413"
    with socket.create_connection((host, int(port)), timeout=60) as connection:  # of a size that is not said
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"%x\r\n" % 2**20 + bytes(2**20) + b"\r\n"
        answer = b""
        try:
            for _ in range(safety.MAX_BODY // 2**20 + 40):
                connection.sendall(chunk)
        except OSError:  # it hangs up rather than read on
            pass
        answer = connection.recv(200)
        assert not answer or answer.split()[1] in (b"413", b"400")
    assert served.get("/healthz").status == 200


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\n", "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        (b"q=a", "multipart/form-data"),
        (b"q=a", "application/x-www-form-urlencoded"),
        (b'{"q": "a"}', "application/json"),
        (form(jpeg(), part="other")[0], "multipart/form-data; boundary=x"),
        (form(b"", part="image")[0], "multipart/form-data; boundary=x"),
        (form(q=["a"] * 100)[0], "multipart/form-data; boundary=x"),
        (form(q="a" * 100_000)[0], "multipart/form-data; boundary=x"),
    ],
    ids=range(11),
)
def test_forms_that_are_none_are_refused(served: Served, body: bytes, kind: str) -> None:
    answer = served.ask("POST", "/api/search", body, {"Content-Type": kind})
    assert answer.status in (400, 415, 422), answer
    assert answer.json["error"]


def test_uploads_leave_nothing_on_the_disk(served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))  # a file there would be an error
    before = {path for path in served.folder.rglob("*") if "thumbnails" not in path.parts}
    large = encoded(Image.effect_noise((1500, 1500), 90), "PNG")
    assert len(large) > 2**20
    assert served.post("/api/search", large, k=1).status == 200
    assert {path for path in served.folder.rglob("*") if "thumbnails" not in path.parts} == before


def test_a_token_is_asked_for(gallery: Path) -> None:
    with serving(gallery, token=TOKEN, names=["photos.example"]) as served:
        assert served.get("/healthz").status == 200
        for path in ("/", "/api/search?q=a", "/api/items/1/image", "/metrics", "/openapi.json", "/main.js"):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Bearer {TOKEN}x"},
                {"Authorization": f"Basic {TOKEN}"},
                {"Authorization": "Bearer \xe9"},
                {"Cookie": f"{safety.COOKIE}=wrong"},
                {"Cookie": "=;;=\x01"},
            ):
                answer = served.get(path, headers)
                assert answer.status == 401, (path, headers)
                assert TOKEN not in str(answer)
        assert served.get("/api/search?q=a", {"Authorization": f"Bearer {TOKEN}"}).status == 200
        assert served.get(f"/api/search?q=a&token={TOKEN}").status == 401
        entered = served.get("/", token=TOKEN, q="a cat")
        assert (entered.status, entered.headers["location"]) == (303, "/?q=a+cat")
        cookie = entered.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in cookie.split(";")}
        assert served.get("/", {"Cookie": cookie.partition(";")[0]}).status == 200
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        assert served.get("/api/status", {**allowed, "Host": "photos.example"}).status == 200
        assert served.get("/api/status", {**allowed, "Host": "192.0.2.7:80"}).status == 200
        assert served.get("/api/status", {**allowed, "Host": "evil.example"}).status == 403


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = safety.hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(safety.hmac, "compare_digest", noted)
    access = Access(token=TOKEN)
    assert [access.is_token(given) for given in ("", "a", TOKEN[:-1], TOKEN + "x", TOKEN)] == [False] * 4 + [True]
    assert set(compared) == {(32, 32)}


def test_addresses_that_cannot_be_are_refused(gallery: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "--port" in refused(2, "serve", "-c", gallery, "--port", port)
    assert "--token" in refused(2, "serve", "-c", gallery, "--host", "0.0.0.0")
    assert "16" in refused(2, "serve", "-c", gallery, "--host", "0.0.0.0", "--token", "short")
    assert "no address" in refused(2, "serve", "-c", gallery, "--host", "no.such.host.invalid", "--token", TOKEN)
    assert "no collection" in refused(3, "serve", "-c", tmp_path / "none")


def test_the_queue_has_an_end() -> None:
    turnstile = Turnstile(limit=3, share=2)
    with turnstile.enter("a"), turnstile.enter("a"):
        with pytest.raises(ServiceBusy), turnstile.enter("a"):
            pass
        with turnstile.enter("b"):
            assert len(turnstile) == 3
            with pytest.raises(ServiceBusy), turnstile.enter("c"):
                pass
        assert len(turnstile) == 2
    assert len(turnstile) == 0


def test_a_greedy_client_is_told_to_come_again(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, entered = threading.Event(), threading.Event()
    real = Collection.answer_all

    def slow(self: Collection, asks: Any) -> Any:
        entered.set()
        assert free.wait(60)
        return real(self, asks)

    with serving(gallery) as served:
        assert served.get("/api/search", q="a cat").status == 200
        monkeypatch.setattr(Collection, "answer_all", slow)
        answers: list[Any] = []
        asking = [
            threading.Thread(target=lambda n=n: answers.append(served.get("/api/search", q=f"greedy {n}")))
            for n in range(SHARE + 6)
        ]
        for thread in asking:
            thread.start()
        assert entered.wait(60)
        wait_for(lambda: len(answers) == 6)  # all others wait
        assert {answer.status for answer in answers} == {429}
        assert answers[0].headers["retry-after"] == "1"
        # what needs no model is served meanwhile, and what was answered before too
        assert served.get("/api/items").status == 200
        assert served.get("/api/search", q="a cat").status == 200
        free.set()
        for thread in asking:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * SHARE + [429] * 6


def test_only_so_many_pictures_are_in_memory(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    real = Collection.answer_all

    def slow(self: Collection, asks: Any) -> Any:
        assert free.wait(60)
        return real(self, asks)

    with serving(gallery) as served:
        share = served.server.service.uploads.share
        monkeypatch.setattr(Collection, "answer_all", slow)
        answers: list[Any] = []
        asking = [
            threading.Thread(target=lambda n=n: answers.append(served.post("/api/search", jpeg(seed=n), k=1)))
            for n in range(share + 3)
        ]
        for thread in asking:
            thread.start()
        wait_for(lambda: len(answers) == 3)
        assert {answer.status for answer in answers} == {429}
        assert f"e5v_search_uploads {share}" in served.get("/metrics").body.decode()
        free.set()
        for thread in asking:
            thread.join()
        assert sorted(answer.status for answer in answers) == [200] * share + [429] * 3
        assert len(served.server.service.uploads) == 0


def test_who_only_connects_takes_no_place_from_others(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SHARE", 4)
    with serving(gallery) as served, ExitStack() as stack:
        host, _, port = served.host.partition(":")

        def connected(source: str) -> socket.socket:
            found = socket.create_connection((host, int(port)), timeout=30, source_address=(source, 0))
            return stack.enter_context(found)

        silent = [connected("127.0.0.1") for _ in range(4)]
        assert connected("127.0.0.1").recv(100).startswith(b"HTTP/1.1 429 ")
        other = connected("127.0.0.2")
        other.sendall(f"GET /healthz HTTP/1.1\r\nHost: {served.host}\r\n\r\n".encode())
        assert other.recv(100).startswith(b"HTTP/1.1 200 ")
        silent[0].close()

        def let_in() -> bool:
            with suppress(OSError):  # hung up on
                return served.get("/healthz").status == 200
            return False

        wait_for(let_in)


def test_a_head_that_comes_slowly_has_an_end(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with serving(gallery) as served:
        host, _, port = served.host.partition(":")
        whole = f"GET /healthz HTTP/1.1\r\nHost: {served.host}\r\n\r\n".encode()
        for start in (b"", b"GET /healthz HT", whole + b"GET /heal"):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(start)
                answer = b""
                while part := connection.recv(1000):
                    answer += part
                assert answer.count(b"200 OK") == (len(start) > len(whole))


def test_who_is_waited_for_goes_first() -> None:
    turns, order, ready = Turns(), [], threading.Barrier(3)

    def take(name: str, urgent: bool) -> None:
        ready.wait()
        with turns.take(urgent):
            order.append(name)

    with turns.take(urgent=False):
        threads = [threading.Thread(target=take, args=("later", False)), threading.Thread(target=take, args=("first", True))]
        for thread in threads:
            thread.start()
        ready.wait()
        wait_for(lambda: turns._urgent == 1)
    for thread in threads:
        thread.join()
    assert order == ["first", "later"]


def test_it_stops_cleanly_when_told_to(gallery: Path, tmp_path: Path) -> None:
    shutil.copytree(gallery, tmp_path / "c", ignore=shutil.ignore_patterns("*.sock"))
    process = start("serve", "-c", tmp_path / "c", "--port", "0")
    assert process.stdout is not None
    address = process.stdout.readline().decode().strip()
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as listener:
        listener.sendall(f"GET /api/events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert b"200 OK" in listener.recv(1000)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"")


def test_a_slow_body_has_an_end(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety.Safety.__init__, "__defaults__", (safety.MAX_BODY, 0.5))
    with serving(gallery) as served:
        host, _, port = served.host.partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /api/search HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n--x".encode())
            assert connection.recv(200).split()[1] == b"408"
