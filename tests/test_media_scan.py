"""The scan against a plain walk on random trees, each rule by itself, and what must not be forgotten."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pictures
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from e5v_search.media import SUFFIXES, Scan, shown


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def scanned(*roots: Path | str) -> list[str]:
    return [found.path for found in Scan(roots)]


def names(base: Path, *roots: Path) -> list[str]:
    return [os.path.relpath(path, base) for path in scanned(*roots or (base,))]


# what is found


def test_order_sizes_and_times(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.png", "a/x.tiff", "z.JPG", "c.txt", "noext", "b/a.jpg/inside.webp"):
        touch(tmp_path / name, name.encode())
    found = list(Scan([tmp_path]))
    assert [os.path.relpath(f.path, tmp_path) for f in found] == [
        "z.JPG",
        "a/x.tiff",
        "b/1.png",
        "b/2.jpg",
        "b/a.jpg/inside.webp",
    ]
    for each in found:
        status = os.stat(each.path)
        assert (each.size, each.mtime_ns, each.on_mount) == (status.st_size, status.st_mtime_ns, False)


def test_every_suffix_in_any_case(tmp_path: Path) -> None:
    want = {touch(tmp_path / f"{i}{suffix}").name for i, suffix in enumerate(sorted(SUFFIXES))}
    want |= {touch(tmp_path / f"{i}{suffix.upper()}").name for i, suffix in enumerate(sorted(SUFFIXES), start=100)}
    assert set(names(tmp_path)) == want


def test_hidden_names_are_passed_over_unless_asked_for(tmp_path: Path) -> None:
    hidden = touch(tmp_path / ".hidden.jpg")
    inside = touch(tmp_path / ".cache/a.jpg")
    touch(tmp_path / "a.jpg")
    touch(tmp_path / ".jpg")
    assert names(tmp_path) == ["a.jpg"]
    assert names(tmp_path, tmp_path, hidden, inside.parent) == [".hidden.jpg", "a.jpg", ".cache/a.jpg"]


def test_a_named_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    file = touch(tmp_path / "IMG_0001.download")
    assert names(tmp_path, file) == ["IMG_0001.download"]
    assert names(tmp_path, file, file, tmp_path) == ["IMG_0001.download"]


def test_odd_names(tmp_path: Path) -> None:
    paths = {str(path) for path in pictures.write_odd_names(tmp_path / os.fsdecode(b"odd \xe9 folder"))}
    found = scanned(tmp_path)
    assert set(found) == paths
    assert all(os.path.exists(path) for path in found)


@given(st.text(alphabet=st.characters(exclude_categories=())).map(lambda text: text + "\ud800\udcff\n"))
def test_shown_names_can_be_printed(name: str) -> None:
    line = shown(name)
    assert line.encode("utf-8")
    assert line.isprintable()
    assert line.endswith(r"\ud800\xff\n")


def test_relative_and_byte_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    assert scanned(".") == scanned("../" + tmp_path.name) == [str(tmp_path / "a.jpg")]
    assert [f.path for f in Scan([os.fsencode(tmp_path)])] == [str(tmp_path / "a.jpg")]  # type: ignore[list-item]


def test_deep_folders(tmp_path: Path) -> None:
    depth = 1050  # more than Python may recurse
    for n in range(1, depth):
        os.mkdir(f"{tmp_path}/{'d/' * n}")
    path = f"{tmp_path}/{'d/' * (depth - 1)}a.jpg"
    try:
        touch(Path(path))
        scan = Scan([tmp_path])
        assert [f.path for f in scan] == [path]
        os.unlink(path)
        list(scan)
        assert scan.keep_reason(path, False) is None
    finally:
        for n in range(depth - 1, 0, -1):  # shutil.rmtree would recurse
            os.rmdir(f"{tmp_path}/{'d/' * n}")


# links


def test_folder_links_loops_and_overlaps_give_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path / "in/sub/a.jpg")
    touch(tmp_path / "out/b.jpg")
    (tmp_path / "in/self").symlink_to(".")
    (tmp_path / "in/sub/up").symlink_to("../..", target_is_directory=True)
    (tmp_path / "in/also").symlink_to(tmp_path / "in/sub")
    (tmp_path / "in/one").symlink_to(tmp_path / "out")
    (tmp_path / "in/two").symlink_to(tmp_path / "out")
    assert names(tmp_path, tmp_path / "in") == ["in/sub/a.jpg", "in/one/b.jpg"]
    everything = ["in/sub/a.jpg", "out/b.jpg"]
    assert names(tmp_path) == everything
    assert sorted(names(tmp_path, tmp_path / "in/sub", tmp_path / "out", tmp_path, tmp_path / "in/self")) == everything


def test_file_links(tmp_path: Path) -> None:
    inside, outside = touch(tmp_path / "in/a.jpg"), touch(tmp_path / "out/b.jpg")
    object_ = touch(tmp_path / "in/.objects/c.jpg")
    no_suffix, hidden = touch(tmp_path / "in/blob"), touch(tmp_path / "in/.hidden.jpg")
    for name, target in (
        ("1", inside),
        ("2", outside),
        ("3", outside),
        ("4", object_),
        ("5", no_suffix),
        ("6", tmp_path / "in/2.jpg"),
    ):
        (tmp_path / f"in/{name}.jpg").symlink_to(target)
    (tmp_path / "in/7.jpg").symlink_to(hidden)
    (tmp_path / "in/readme.txt").symlink_to(outside)
    assert names(tmp_path, tmp_path / "in") == ["in/a.jpg", "in/2.jpg", "in/4.jpg", "in/5.jpg", "in/7.jpg"]
    assert names(tmp_path, tmp_path / "in", outside) == ["out/b.jpg", "in/a.jpg", "in/4.jpg", "in/5.jpg", "in/7.jpg"]
    # a link that another one stands for now is a duplicate; the others are what they were
    scan = Scan([tmp_path / "in"])
    list(scan)
    assert [scan.keep_reason(str(tmp_path / f"in/{n}.jpg"), False) for n in (1, 3, 6)] == [None, None, None]
    # through a linked folder as well
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    assert names(tmp_path, tmp_path / "in") == ["in/a.jpg", "in/link/b.jpg", "in/4.jpg", "in/5.jpg", "in/7.jpg"]
    assert names(tmp_path, tmp_path / "in", outside) == ["out/b.jpg", "in/a.jpg", "in/4.jpg", "in/5.jpg", "in/7.jpg"]


def test_broken_links(tmp_path: Path) -> None:
    touch(tmp_path / "ok.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "folder").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    scan = Scan([tmp_path])
    assert [os.path.basename(f.path) for f in scan] == ["ok.jpg"]
    assert {os.path.basename(p.path): p.reason for p in scan.problems} == {
        "gone.jpg": "a link to a file that is not there",
        "self.jpg": "a link to a file that is not there",
    }


# what cannot be looked at


def test_pipes_sockets_and_devices_are_listed_and_never_opened(tmp_path: Path) -> None:
    touch(tmp_path / "ok.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path may have 108 bytes
        try:
            listener.bind("socket.png")
        finally:
            os.chdir(here)
        (tmp_path / "device.gif").symlink_to("/dev/zero")
        scan = Scan([tmp_path, tmp_path / "pipe", Path("/dev/null")])
        assert [os.path.basename(f.path) for f in scan] == ["ok.jpg"]
    assert {os.path.basename(p.path): p.reason for p in scan.problems} == {
        "pipe": "a pipe, not a file",
        "null": "a device, not a file",
        "pipe.jpg": "a pipe, not a file",
        "socket.png": "a socket, not a file",
        "device.gif": "a device, not a file",
    }


@pytest.mark.usefixtures("permissions_apply")
def test_unreadable_folders_are_listed_and_nothing_in_them_forgotten(tmp_path: Path) -> None:
    names = ("ok.jpg", "shut/a.jpg", "shut/deep/b.jpg", "blind/c.jpg", "drop/d.jpg", "secret.jpg")
    files = [touch(tmp_path / name) for name in names]
    (tmp_path / "drop/d.jpg").unlink()
    # no right at all; may be listed, not entered; may be entered, not listed; may be found (reading it fails, later)
    modes = {"shut": 0, "blind": 0o600, "drop": 0o300, "secret.jpg": 0}
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    try:
        scan = Scan([tmp_path])
        assert [os.path.basename(f.path) for f in scan] == ["ok.jpg", "secret.jpg"]
        reasons = {os.path.basename(p.path): p.reason for p in scan.problems}
        assert reasons == dict.fromkeys(["shut", "drop", "c.jpg"], "permission denied")
        for file in files[1:5]:
            assert scan.keep_reason(str(file), False) is not None
        assert scan.keep_reason(str(tmp_path / "never.jpg"), False) is None
        root = Scan([tmp_path / "shut"])
        assert (list(root), root.missing, [p.path for p in root.problems]) == ([], [], [str(tmp_path / "shut")])
        assert root.keep_reason(str(files[1]), False) is not None
    finally:
        for name in modes:
            (tmp_path / name).chmod(0o700)


def test_a_folder_that_goes_away_while_we_look(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/2.jpg", "c/3.jpg"):
        touch(tmp_path / name)
    scan = Scan([tmp_path])
    found = iter(scan)
    assert next(found).path.endswith("1.jpg")
    shutil.rmtree(tmp_path / "b")
    assert [os.path.basename(f.path) for f in found] == ["3.jpg"]
    assert (scan.problems, scan.warnings) == ([], [])


# what must not be forgotten


def test_really_gone(tmp_path: Path) -> None:
    kept, file, folder = touch(tmp_path / "0.jpg"), touch(tmp_path / "a.jpg"), touch(tmp_path / "b/c/d.jpg")
    now_a_file = touch(tmp_path / "e/f.jpg")
    os.unlink(file)
    shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "e")
    touch(tmp_path / "e")
    scan = Scan([tmp_path])
    assert [f.path for f in scan] == [str(kept)]
    for path in (file, folder, now_a_file):
        assert scan.keep_reason(str(path), False) is None
    assert scan.warnings == []
    assert scan.covers(str(file))
    assert not scan.covers(str(tmp_path) + "-2/a.jpg")
    assert scan.keep_reason(str(tmp_path) + "-2/a.jpg", False) is not None


def test_a_missing_root(tmp_path: Path) -> None:
    touch(tmp_path / "here/a.jpg")
    scan = Scan([tmp_path / "here", tmp_path / "disk"])
    assert scan.missing == [str(tmp_path / "disk")]
    assert len(list(scan)) == 1
    assert scan.missing == [str(tmp_path / "disk")]
    assert len(scan.warnings) == 1
    assert scan.keep_reason(str(tmp_path / "disk/x/b.jpg"), False) is not None
    assert scan.keep_reason(str(tmp_path / "here/b.jpg"), False) is None


def test_an_empty_root_may_be_an_unmounted_disk(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "photos").mkdir()
    scan = Scan([tmp_path / "disk"])
    assert (list(scan), scan.problems, scan.warnings) == ([], [], [])  # an empty folder is no fault
    assert scan.keep_reason(str(tmp_path / "disk/x/b.jpg"), False) is not None
    assert scan.keep_reason(str(tmp_path / "disk/c.jpg"), False) is not None
    assert len(scan.warnings) == 1
    # an empty folder below a root was emptied by someone
    touch(tmp_path / "photos/a.jpg")
    (tmp_path / "photos/empty").mkdir()
    scan = Scan([tmp_path / "photos"])
    assert len(list(scan)) == 1
    assert scan.keep_reason(str(tmp_path / "photos/empty/b.jpg"), False) is None


def test_a_root_that_goes_away_while_we_look(tmp_path: Path) -> None:
    for name in ("a.jpg", "b/c.jpg"):
        touch(tmp_path / "disk" / name)
    scan = Scan([tmp_path / "disk"])
    found = iter(scan)
    next(found)
    (tmp_path / "disk").rename(tmp_path / "away")
    (tmp_path / "disk").mkdir()  # what is left of a mount
    assert list(found) == []
    assert scan.missing == [str(tmp_path / "disk")]
    assert scan.keep_reason(str(tmp_path / "disk/b/c.jpg"), False) is not None


def test_links_to_what_is_not_there(tmp_path: Path) -> None:
    touch(tmp_path / "in/a.jpg")
    touch(tmp_path / "disk/x.jpg")
    (tmp_path / "in/link").symlink_to(tmp_path / "disk")
    (tmp_path / "in/y.jpg").symlink_to(tmp_path / "disk/x.jpg")
    known = [str(tmp_path / "in/link/x.jpg"), str(tmp_path / "in/link/deep/z.jpg"), str(tmp_path / "in/y.jpg")]
    shutil.rmtree(tmp_path / "disk")
    scan = Scan([tmp_path / "in"])
    list(scan)
    assert all(scan.keep_reason(path, False) for path in known)
    (tmp_path / "disk").mkdir()  # the mount point of the linked disk
    list(scan)
    assert all(scan.keep_reason(path, False) for path in known)
    touch(tmp_path / "disk/other.jpg")
    list(scan)
    assert [scan.keep_reason(path, False) for path in known[:2]] == [None, None]


def test_what_is_still_there_but_taken_by_no_rule_is_kept(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    once_named = touch(tmp_path / "IMG.download")
    scan = Scan([tmp_path])
    assert len(list(scan)) == 1
    assert scan.keep_reason(str(once_named), False) is not None
    # a second name of a photo that is found by its own is a duplicate, not a photo
    (tmp_path / "link").symlink_to(".")
    list(scan)
    assert scan.keep_reason(str(tmp_path / "link/a.jpg"), False) is None


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system mounted at tmp_path/photos/disk, and how to unmount it."""
    point = tmp_path / "photos/disk"
    point.mkdir(parents=True)
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", point], capture_output=True).returncode
    ):
        pytest.skip("mounting needs root")
    up = True

    def unmount() -> None:
        nonlocal up
        if up:
            subprocess.run(["umount", point], check=True)
        up = False

    yield point, unmount
    unmount()


def test_a_disk_mounted_below_the_root(tmp_path: Path, mounted: tuple[Path, Callable[[], None]]) -> None:
    point, unmount = mounted
    touch(tmp_path / "photos/a.jpg")
    touch(point / "b.jpg")
    touch(point / "deep/c.jpg")
    scan = Scan([tmp_path / "photos"])
    assert [(os.path.basename(f.path), f.on_mount) for f in scan] == [("a.jpg", False), ("b.jpg", True), ("c.jpg", True)]
    shutil.rmtree(point / "deep")
    list(scan)
    assert scan.keep_reason(str(point / "deep/c.jpg"), True) is None  # deleted while the disk is there
    unmount()
    assert [os.path.basename(f.path) for f in scan] == ["a.jpg"]
    assert scan.keep_reason(str(point / "b.jpg"), True) is not None
    assert scan.keep_reason(str(point / "deep/c.jpg"), True) is not None
    assert len(scan.warnings) == 1
    assert scan.keep_reason(str(tmp_path / "photos/z.jpg"), False) is None
    os.rmdir(point)  # and with the mount point gone, as automounters do
    list(scan)
    assert scan.keep_reason(str(point / "b.jpg"), True) is not None


def test_a_disk_mounted_at_the_root(mounted: tuple[Path, Callable[[], None]]) -> None:
    point, unmount = mounted
    file = touch(point / "b.jpg")
    scan = Scan([point])
    assert [f.on_mount for f in scan] == [False]
    unmount()
    assert list(scan) == []
    assert scan.keep_reason(str(file), False) is not None


# random trees

_NAMES = st.sampled_from(["a.jpg", "b.PNG", "c", "d.txt", ".h.jpg", ".hid", "e", "f.gif"])


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str, str]]:
    """Entries (kind, path, target) to be made in this order; what cannot be made is left out."""
    places = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
    entry = st.tuples(st.sampled_from(["file", "folder", "link"]), places, places)
    return draw(st.lists(entry, max_size=14))


def reference(root: Path) -> set[str]:
    """The real files that a plain walk, following every link, comes to under names that the rules allow."""
    real: set[str] = set()
    visited: set[str] = set()

    def walk(folder: str) -> None:
        if os.path.realpath(folder) in visited:
            return
        visited.add(os.path.realpath(folder))
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if os.path.isdir(path):
                walk(path)
            elif os.path.isfile(path) and os.path.splitext(name)[1].lower() in SUFFIXES:
                real.add(os.path.realpath(path))

    walk(str(root))
    return real


def plant(tree: list[tuple[str, str, str]], base: Path) -> Path:
    """Make `tree` in base/root, beside base/outside."""
    root, outside = base / "root", base / "outside"
    root.mkdir(parents=True, exist_ok=True)
    touch(outside / "o.jpg")
    touch(outside / "sub/p.png")
    for kind, place, target in tree:
        path = root / place
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file" and not path.is_symlink():
                path.write_bytes(b"x")
            elif kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to({"a.jpg": outside / "o.jpg", "c": outside, "e": root}.get(target, root / target))
        except OSError:
            continue
    return root


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees())
def test_random_trees_equal_a_plain_walk(tree: list[tuple[str, str, str]], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    root = plant(tree, tmp_path)
    found = scanned(root)
    assert found == scanned(root)
    assert len(found) == len(set(found))
    by_file = [os.path.realpath(path) for path in found]
    assert len(by_file) == len(set(by_file)), "a file twice"
    assert set(by_file) == reference(root)
    own = {
        os.path.join(folder, name)
        for folder, _, files in os.walk(root)
        for name in files
        if not os.path.islink(os.path.join(folder, name)) and "/." not in os.path.join(folder, name)[len(str(root)) :]
    }
    assert {path for path in found if os.path.realpath(path) == path} == {
        p for p in own if p.lower().endswith((".jpg", ".png", ".gif"))
    }


# looking at the changed parts only


def update(known: dict[str, bool], roots: list[Path], *below: Path) -> dict[str, bool]:
    """What is known (path -> on_mount) after a scan of the parts `below` or the whole, as a collection would keep it."""
    scan = Scan(roots, below=[str(path) for path in below] or None)
    found = {f.path: f.on_mount for f in scan}
    assert len(found) == len(list(scan)), "a file twice"
    tops = tuple(scan.tops)
    seen = {p for p in known if p in tops or p.startswith(tuple(f"{top.rstrip('/')}/" for top in tops))}
    gone = {p for p in seen - found.keys() if scan.keep_reason(p, known[p]) is None}
    return {p: m for p, m in (known | found).items() if p not in gone}


_CHANGES = st.lists(
    st.tuples(st.sampled_from(["delete", "move", "move in", "move out"]), *[st.integers(0, 99)] * 2), max_size=4
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=trees(), changes=_CHANGES, after=trees(), nested=st.booleans())
# a photo that has become a link to nowhere is kept, as its target may be on a disk that is away
@example(
    before=[("file", "a.jpg", "a.jpg")],
    changes=[("delete", 0, 0)],
    after=[("link", "a.jpg", "a.jpg/a.jpg")],
    nested=False,
)
def test_the_changed_parts_tell_as_much_as_the_whole(
    before: list[tuple[str, str, str]],
    changes: list[tuple[str, int, int]],
    after: list[tuple[str, str, str]],
    nested: bool,
    tmp_path: Path,
) -> None:
    shutil.rmtree(tmp_path)
    root = plant([entry for entry in before if entry[0] != "link"], tmp_path)
    touch(root / "always.jpg")  # an empty root would stand for an unmounted disk
    roots = [root, root / "e/c"] if nested else [root]
    known = {f.path: f.on_mount for f in Scan(roots)}
    changed = {root / place for _, place, _ in after}
    changed |= {above for path in changed for above in path.parents if above.is_relative_to(root) and not above.exists()}
    for how, i, j in changes:
        places = sorted(p for p in root.rglob("*") if p.name != "always.jpg")
        if not places:
            break
        path, other = places[i % len(places)], places[j % len(places)].parent / "moved.jpg"
        if how == "delete":
            (shutil.rmtree if path.is_dir() else os.unlink)(path)
        elif how == "move" and not other.is_relative_to(path) and not other.exists():
            path.rename(other)
            changed.add(other)
        elif how == "move out" and not (tmp_path / "away").exists():
            path.rename(tmp_path / "away")
        elif how == "move in" and not other.exists() and (tmp_path / "outside").exists():
            (tmp_path / "outside").rename(other)
            changed.add(other)
        changed.add(path)
    plant(after, tmp_path)
    assert update(known, roots, *changed) == update(known, roots)


def test_parts_that_cannot_be_judged_keep_what_is_known(tmp_path: Path, mounted: tuple[Path, Callable[[], None]]) -> None:
    point, unmount = mounted
    root = tmp_path / "photos"
    gone = [touch(root / "a.jpg"), touch(root / "b/c.jpg"), touch(point / "d.jpg"), touch(point / "e/f.jpg")]
    known = {f.path: f.on_mount for f in Scan([root])}
    unmount()
    kept = update(known, [root], *gone)
    assert kept == known
    root.rename(tmp_path / "away")
    assert update(known, [root], *gone, root) == known  # the root itself is not there
    root.mkdir()
    assert update(known, [root], *gone, root) == known  # or there, and empty
    touch(root / "new.jpg")
    assert update(known, [root], *gone).keys() == {str(path) for path in gone[2:]}  # the disk is still away


def test_changed_files_among_the_roots(tmp_path: Path) -> None:
    odd, inside, other = touch(tmp_path / "IMG.download"), touch(tmp_path / "in/x.jpg"), touch(tmp_path / "in/y.jpg")
    roots = [odd, inside, tmp_path / "in", tmp_path / "in/.hidden"]
    hidden = touch(tmp_path / "in/.hidden/z.jpg")
    touch(tmp_path / "in/.other/z.jpg")

    def found(*below: Path) -> list[str]:
        return [os.path.basename(f.path) for f in Scan(roots, below=[str(path) for path in below])]

    assert found(odd) == ["IMG.download"]
    assert found(inside) == ["x.jpg"]
    assert found(inside, other, tmp_path / "in/none.jpg") == ["x.jpg", "y.jpg"]
    assert found(hidden) == ["z.jpg"]
    assert found(tmp_path / "in/.other/z.jpg", tmp_path / "in/.other") == []
    assert sorted(found(tmp_path / "in", inside)) == ["x.jpg", "y.jpg"]
