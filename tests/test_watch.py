"""`index --watch` as a process of its own over real folders, asked from this one; and its follower by itself."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pictures
import pytest
import replica
from command_line import refused, run, start
from filelock import FileLock

from e5v_search import Collection, Embedder, Report
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.collection import Follower, watch
from e5v_search.errors import DiskFull
from e5v_search.media import changes as changes_module

ROOT = Path(__file__).parent.parent
EVENTUALLY = 60.0  # seconds; what is waited for takes two or three on a quiet machine


def eventually(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + EVENTUALLY
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def paint(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.photo(60 + seed % 7, 40 + seed % 5, seed).save(path, quality=90)
    return path


class Watched:
    """A collection that a process follows, and what a search in another process finds in it."""

    def __init__(self, base: Path, model: Path, *options: str) -> None:
        self.photos, self.place = base / "photos", base / "collection"
        self.anchor = paint(self.photos / "anchor.jpg", 0)
        self.err = (base / "stderr").open("w+b")
        command = ["index", self.photos, "-c", self.place, "--model", model, "--dtype", "float32", "--watch", *options]
        program = "from e5v_search.cli import main; from e5v_search.collection import watch; watch.PATIENCE = 4; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=self.err
        )
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()  # comes when the first look is over

    def results(self) -> set[str]:
        with Collection.open(self.place, create=False) as c:
            return {os.path.relpath(hit.path or "", self.photos) for hit in c.search(image=1, k=1000)}

    def content(self, name: str) -> str:
        """Which photo the results take `name` for: the hash of its content."""
        with Collection.open(self.place, create=False) as c:
            item = c.catalog.item_by_path(str(self.photos / name))
            return item.content_hash if item else ""

    def failed(self) -> list[str]:
        with Collection.open(self.place, create=False) as c:
            return [os.path.relpath(failure.path, self.photos) for failure in c.catalog.failures()]

    def said(self) -> str:
        return Path(str(self.err.name)).read_text()

    def becomes(self, *names: str) -> None:
        """Wait until these are the results, beside the anchor."""
        assert self.process.poll() is None, self.said()
        eventually(lambda: self.results() == {"anchor.jpg", *names})

    def stop(self, signum: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(signum)
        stdout, _ = self.process.communicate(timeout=EVENTUALLY)
        return self.process.returncode, stdout.decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replica.build(tmp_path_factory.mktemp("model"))[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Watched]:
    base = tmp_path_factory.mktemp("watched")
    watched = Watched(base, model)
    yield watched
    watched.process.kill()
    watched.process.communicate()


@pytest.fixture
def at(watched: Watched) -> Iterator[Watched]:
    """The process, with nothing but the anchor in its folder before and after."""
    yield watched
    for path in watched.photos.iterdir():
        if path != watched.anchor:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    watched.becomes()


def test_new_changed_renamed_and_deleted(at: Watched) -> None:
    path = paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    before = at.content("a.jpg")
    paint(path, 2)
    eventually(lambda: at.content("a.jpg") not in ("", before))
    path.rename(at.photos / "b.jpg")
    at.becomes("b.jpg")
    (at.photos / "b.jpg").unlink()
    at.becomes()
    assert "+1 ~0 -0" in at.said()
    assert "+0 ~1 -0" in at.said()


def test_as_editors_and_download_programs_save(at: Watched) -> None:
    path = paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    before = at.content("a.jpg")
    paint(at.photos / ".a.jpg.tmp.png", 3).replace(path)  # written beside it, then put in its place
    eventually(lambda: at.content("a.jpg") not in ("", before))
    before = at.content("a.jpg")
    path.rename(at.photos / "a.jpg~")  # a backup first, then the new one under the old name
    paint(path, 4)
    eventually(lambda: at.content("a.jpg") not in ("", before))
    paint(at.photos / "b.png", 5).rename(at.photos / "b.png.part")
    at.becomes("a.jpg")
    (at.photos / "b.png.part").rename(at.photos / "b.png")
    at.becomes("a.jpg", "b.png")


def test_folders_moved_in_out_and_about(at: Watched, tmp_path: Path) -> None:
    paint(tmp_path / "trip/one.jpg", 1)
    paint(tmp_path / "trip/day/two.jpg", 2)
    (tmp_path / "trip").rename(at.photos / "trip")
    at.becomes("trip/one.jpg", "trip/day/two.jpg")
    (at.photos / "trip/day").rename(at.photos / "day 1")
    at.becomes("trip/one.jpg", "day 1/two.jpg")
    paint(at.photos / "day 1/three.jpg", 3)  # the folder is followed under its new name
    at.becomes("trip/one.jpg", "day 1/two.jpg", "day 1/three.jpg")
    (at.photos / "trip").rename(tmp_path / "away")
    paint(tmp_path / "away/four.jpg", 4)
    at.becomes("day 1/two.jpg", "day 1/three.jpg")


def test_many_at_once_and_new_folders(at: Watched) -> None:
    names = [f"{i % 3}/{i % 7}/{i}.jpg" for i in range(60)]
    for i, name in enumerate(names):
        paint(at.photos / name, i + 1)
    at.becomes(*names)
    shutil.rmtree(at.photos / "1")
    at.becomes(*[name for name in names if not name.startswith("1/")])


def test_a_file_written_slowly_comes_when_it_is_whole(at: Watched, tmp_path: Path) -> None:
    data = paint(tmp_path / "whole.jpg", 9).read_bytes()
    with open(at.photos / "slow.jpg", "wb", buffering=0) as file:
        for part in (data[:300], data[300:700], data[700:]):
            file.write(part)
            time.sleep(1.2)  # longer than a path has to rest: each part is looked at
            assert at.failed() == []
    at.becomes("slow.jpg")
    assert "slow.jpg" not in at.said()


def test_a_file_that_stays_broken_is_listed_in_the_end(at: Watched, tmp_path: Path) -> None:
    data = paint(tmp_path / "whole.jpg", 9).read_bytes()
    (at.photos / "broken.jpg").write_bytes(data[:400])
    eventually(lambda: at.failed() == ["broken.jpg"])
    assert at.said().count("broken.jpg: truncated JPEG") == 1
    (at.photos / "broken.jpg").write_bytes(data)  # a copy that had stopped for long goes on
    at.becomes("broken.jpg")
    assert at.failed() == []
    (at.photos / "broken.jpg").write_bytes(data[:400])
    eventually(lambda: at.failed() == ["broken.jpg"])
    (at.photos / "broken.jpg").unlink()
    eventually(lambda: at.failed() == [])


def test_links(at: Watched, tmp_path: Path) -> None:
    paint(tmp_path / "elsewhere/one.jpg", 1)
    (at.photos / "link").symlink_to(tmp_path / "elsewhere")
    at.becomes("link/one.jpg")
    paint(tmp_path / "elsewhere/two.jpg", 2)
    at.becomes("link/one.jpg", "link/two.jpg")
    (at.photos / "link").unlink()
    at.becomes()


def test_what_is_no_photo_costs_nothing(at: Watched) -> None:
    paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    note = at.place / "writer.json"
    before = note.stat().st_mtime_ns
    for name in ("notes.txt", "a.jpg.xmp", ".hidden.jpg", "movie.mp4", ".cache/b.jpg"):
        (at.photos / name).parent.mkdir(exist_ok=True)
        (at.photos / name).write_text("x")
    (at.photos / "gone.tmp").write_text("x")
    (at.photos / "gone.tmp").unlink()
    time.sleep(2)
    assert note.stat().st_mtime_ns == before


def test_a_root_that_goes_and_comes_back(at: Watched, tmp_path: Path) -> None:
    paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    at.photos.rename(tmp_path / "unplugged")
    eventually(lambda: "is not there (an unmounted disk?)" in at.said())
    assert at.results() == {"anchor.jpg", "a.jpg"}
    paint(tmp_path / "unplugged/b.jpg", 2)
    (tmp_path / "unplugged/a.jpg").unlink()
    (tmp_path / "unplugged").rename(at.photos)
    at.becomes("b.jpg")
    assert "no longer so: " in at.said()
    paint(at.photos / "c.jpg", 3)  # and followed again
    at.becomes("b.jpg", "c.jpg")


def test_a_root_deleted_and_made_anew(at: Watched) -> None:
    data = at.anchor.read_bytes()
    paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    shutil.rmtree(at.photos)
    time.sleep(1.5)
    at.photos.mkdir()
    at.anchor.write_bytes(data)
    paint(at.photos / "b.jpg", 2)
    at.becomes("b.jpg")
    paint(at.photos / "c.jpg", 3)
    at.becomes("b.jpg", "c.jpg")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a disk needs root on Linux")
def test_a_disk_below_the_root(at: Watched) -> None:
    point = at.photos / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", point]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        paint(point / "a.jpg", 1)
        at.becomes("disk/a.jpg")
    finally:
        subprocess.run(["umount", point], check=True)
    eventually(lambda: "a disk under" in at.said())
    assert at.results() == {"anchor.jpg", "disk/a.jpg"}
    subprocess.run(mount, check=True)
    try:
        paint(point / "b.jpg", 2)
        at.becomes("disk/b.jpg")  # another disk in the same place, without a.jpg
        subprocess.run(["umount", point], check=True)
        subprocess.run(mount, check=True)  # at once, and the system may give it all the numbers of the one before
        paint(point / "c.jpg", 3)
        at.becomes("disk/c.jpg")
    finally:
        subprocess.run(["umount", point], check=True)
    with Collection.open(at.place) as c:
        c.forget([point])


def test_another_run_may_write_meanwhile(at: Watched) -> None:
    paint(at.photos / "a.jpg", 1)
    at.becomes("a.jpg")
    assert run("verify", "-c", at.place).stdout == "no errors\n"
    paint(at.photos / "b.jpg", 2)
    at.becomes("a.jpg", "b.jpg")
    assert run("forget", at.photos / "b.jpg", "-c", at.place).exit_code == 0
    assert at.results() == {"anchor.jpg", "a.jpg"}
    (at.photos / "b.jpg").unlink()
    lock = FileLock(at.place / "write.lock")
    with lock:
        paint(at.photos / "c.jpg", 3)
        eventually(lambda: "waiting: " in at.said())
    at.becomes("a.jpg", "c.jpg")
    assert "going on" in at.said()


def test_a_name_that_is_no_text(at: Watched, tmp_path: Path) -> None:
    """The system's notices cannot tell of it, and are done without for a while: the last test with this process."""
    odd = at.photos / os.fsdecode(b"caf\xe9.jpg")
    paint(tmp_path / "x.jpg", 2).rename(odd)
    at.becomes(odd.name)
    paint(at.photos / "a.jpg", 3)
    at.becomes(odd.name, "a.jpg")
    odd.unlink()
    at.becomes("a.jpg")


# its end


def test_it_ends_cleanly_and_tells_programs_what_happened(tmp_path: Path, model: Path) -> None:
    watched = Watched(tmp_path, model, "--json")
    try:
        first = json.loads(watched.first)
        assert (first["added"], first["failed"]) == (1, [])
        paint(watched.photos / "a.jpg", 1)
        watched.becomes("a.jpg")
        watched.anchor.unlink()
        assert watched.process.stdout is not None
        lines = [json.loads(watched.process.stdout.readline()) for _ in range(2)]
        assert [(line["added"], line["updated"], line["removed"]) for line in lines] == [(1, 0, 0), (0, 0, 1)]
        assert lines[0].keys() == first.keys() == {"added", "unchanged", "updated", "removed", "failed", "seconds"}
        assert watched.stop(signal.SIGINT) == (0, "")
        assert watched.said() == ""
    finally:
        watched.process.kill()
        watched.process.communicate()
    with Collection.open(watched.place) as c:
        assert c.verify() == []
        assert not c.status()["index"]["stale"]  # the index is saved
        FileLock(watched.place / "write.lock").acquire(timeout=0)  # and the lock free


def test_stopped_during_its_first_look_it_is_an_index_run(tmp_path: Path, model: Path) -> None:
    for i in range(2000):
        paint(tmp_path / f"photos/{i:04d}.jpg", i % 500)
        (tmp_path / f"photos/{i:04d}.jpg").open("ab").write(b"%d" % i)  # no two alike
    process = start("index", tmp_path / "photos", "-c", tmp_path / "c", "--model", model, "--dtype", "float32", "--watch")
    eventually(lambda: (tmp_path / "c/index.faiss").exists())
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=EVENTUALLY)
    assert process.returncode == 130
    assert b"and the same command goes on from there" in stderr


def test_nothing_to_follow_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(3, "index", tmp_path / "none", "-c", tmp_path / "c", "--watch")


# the follower in this process


@pytest.fixture(scope="module")
def embedder(model: Path) -> LlavaNextEmbedder:
    return Embedder.load(str(model), device="cpu", dtype="float32")  # type: ignore[return-value]


@contextlib.contextmanager
def following(c: Collection, *roots: Path) -> Iterator[tuple[Iterator[Report], list[str]]]:
    notes: list[str] = []
    reports = Follower(c, [(str(root), "image") for root in roots], notes.append).run()
    with contextlib.closing(reports):
        yield reports, notes


def test_a_full_disk_is_waited_for(tmp_path: Path, embedder: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "photos/a.jpg", 1)
    monkeypatch.setattr(watch, "_RETRY_FULL", 0.3)
    with Collection.open(tmp_path / "c", embedder) as c, following(c, tmp_path / "photos") as (reports, notes):
        assert next(reports).added == 1
        commit, full = c.catalog.commit, [True, True]

        def failing(*args: object, **options: object) -> list[int]:
            if full:
                full.pop()
                raise DiskFull("no space left")
            return commit(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(c.catalog, "commit", failing)
        paint(tmp_path / "photos/b.jpg", 2)
        assert next(reports).added == 1
        assert notes == ["waiting: no space left", "going on"]


def test_several_roots_files_among_them(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    odd = paint(tmp_path / "elsewhere/photo.jpg", 1).rename(tmp_path / "elsewhere/photo.download")
    paint(tmp_path / "elsewhere/beside.jpg", 9)
    paint(tmp_path / "photos/a.jpg", 2)
    (tmp_path / "photos/inner").mkdir()
    with (
        Collection.open(tmp_path / "c", embedder) as c,
        following(c, tmp_path / "photos", odd, tmp_path / "photos/inner") as (reports, notes),
    ):
        assert next(reports).added == 2
        paint(tmp_path / "elsewhere/new.jpg", 3).replace(odd)
        assert next(reports).updated == 1
        odd.unlink()
        assert next(reports).warnings == [f"{odd} is not there (an unmounted disk?): nothing under it is forgotten"]
        paint(tmp_path / "photos/inner/b.jpg", 4)
        assert next(reports).added == 1
        assert notes == []
        assert c.verify() == []


def test_texts_and_photos_in_one_folder(tmp_path: Path, embedder: LlavaNextEmbedder) -> None:
    folder, captions = tmp_path / "mixed", tmp_path / "mixed/captions.txt"
    paint(folder / "a.jpg", 1)
    captions.write_text("a dog\na cat\n")
    notes: list[str] = []
    sources = [(str(folder), kind) for kind in ("image", "text", "rendered")]
    with (
        Collection.open(tmp_path / "c", embedder) as c,
        contextlib.closing(Follower(c, sources, notes.append).run()) as reports,
    ):
        assert next(reports).added == 5
        with captions.open("a") as file:
            file.write("a bird\n")
        assert next(reports).added == 2
        paint(folder / "b.jpg", 2)
        assert next(reports).added == 1
        captions.write_text("a bird\na cat\n")
        assert next(reports).removed == 2
        (folder / "notes.md").write_bytes(b"# Caf\xe9\n")
        report = next(reports)
        assert report.failed
        assert all("notes.md" in failure.path for failure in report.failed)
        captions.rename(folder / "moved.txt")
        assert next(reports).removed == 4
        assert c.catalog.count() == {"image": 2, "text": 2, "rendered": 2}
        assert notes == []
        assert c.verify() == []


def test_without_notices_the_folders_are_looked_through(
    tmp_path: Path, embedder: LlavaNextEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*folders: str, **options: object) -> Iterator[set[object]]:
        raise OSError('OS file watch limit reached. about ["/photos"]')
        yield set()

    monkeypatch.setattr(changes_module, "_notices", refuse)
    monkeypatch.setattr(watch, "LOOK_EVERY_UNWATCHED", 0.3)
    monkeypatch.setattr(watch, "PATIENCE", 2.0)
    data = paint(tmp_path / "photos/a.jpg", 1).read_bytes()
    with Collection.open(tmp_path / "c", embedder) as c, following(c, tmp_path / "photos") as (reports, notes):
        assert next(reports).added == 1
        (tmp_path / "photos/b.jpg").write_bytes(data[:300])
        threading.Timer(1.0, lambda: (tmp_path / "photos/b.jpg").write_bytes(data)).start()
        report = next(reports)
        assert (report.added, report.failed) == (1, [])
        (tmp_path / "photos/a.jpg").unlink()
        (tmp_path / "photos/c.jpg").write_bytes(data[:300])
        report = next(reports)
        assert report.removed == 1
        # once it has had its time, which on a busy machine may be the same look
        failed = report.failed or next(reports).failed
        assert [os.path.basename(f.path) for f in failed] == ["c.jpg"]
        assert len(notes) == 1
        assert "sudo sysctl fs.inotify.max_user_watches" in notes[0]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("unshare") is None, reason="needs Linux's user namespaces")
@pytest.mark.parametrize("folders", [3, 30])
def test_the_systems_own_limit(tmp_path: Path, folders: int) -> None:
    """Reached at the beginning, or by a folder that is made later; of neither does the library tell."""
    program = (
        "import os, sys\nfrom e5v_search.media import Changes\nfrom pathlib import Path\n"
        "base, n = Path(sys.argv[1]), int(sys.argv[2])\n"
        "for i in range(n): (base / str(i)).mkdir()\n"
        "changes = Changes([str(base)], print)\n"
        "n = 0\n"
        "while not changes.unwatched:\n"
        "    n += 1; (base / f'later {n}').mkdir(); changes.wait()\n"
    )
    limited = 'echo 12 > /proc/sys/user/max_inotify_watches && exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "-Ur", "sh", "-c", limited, sys.executable, program, str(tmp_path), str(folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=EVENTUALLY)
    if "unshare" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("this machine does not allow user namespaces")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the system watches no more folders (fs.inotify.max_user_watches is reached)")
