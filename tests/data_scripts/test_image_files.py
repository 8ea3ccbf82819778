"""data_scripts/image_files.py: which file a path in an annotation file names, and what is refused."""

import io
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from data_scripts import image_files
from data_scripts.image_files import ImageRoot, PathRule, RootSearch, path_readings, with_slashes
from data_scripts.row_checks import RowError


def touch(folder: Path, *names: str) -> None:
    """Write files whose bytes are their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def refused(call, *arguments) -> RowError:
    with pytest.raises(RowError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize(
    ("path", "readings"),
    [
        ("a.png", [("a.png",)]),
        ("b/./c/a.png", [("b", "c", "a.png")]),
        ("b\\c\\a.png", [("b\\c\\a.png",), ("b", "c", "a.png")]),
        ("b/c\\a.png", [("b", "c\\a.png"), ("b", "c", "a.png")]),
        (" a.png ", [(" a.png ",)]),
        ("a..b.png", [("a..b.png",)]),
    ],
)
def test_paths_are_read_with_the_separators_of_both_systems(path, readings):
    assert path_readings(path, "image") == readings


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (None, "wrong type"),
        (5, "wrong type"),
        ("", "missing image"),
        (" \t", "missing image"),
        (".", "missing image"),
        ("./.", "missing image"),
        ("a\0.png", "missing image"),
        ("\ud800.png", "invalid text"),
        ("/a.png", "path leaves the image root"),
        ("\\a.png", "path leaves the image root"),
        ("C:a.png", "path leaves the image root"),
        ("C:\\a.png", "path leaves the image root"),
        ("..", "path leaves the image root"),
        ("b/../a.png", "path leaves the image root"),
        ("b\\..\\a.png", "path leaves the image root"),
    ],
)
def test_what_is_no_path_below_the_root_is_refused(path, reason):
    error = refused(path_readings, path, "file_path")
    assert (error.field, error.reason) == ("file_path", reason)


def test_redundant_parts_and_backslashes_are_normalised():
    assert with_slashes("b\\c/./a.png") == "b/c/a.png"


def test_a_rule_drops_as_many_folders_as_it_names_and_keeps_the_name_of_the_file():
    rule = PathRule("imgs", ("set", "train"))
    assert rule.apply(("set", "train", "a.png")) == os.path.join("imgs", "a.png")
    assert rule.apply(("set", "train", "train", "b", "a.png")) == os.path.join("imgs", "train", "b", "a.png")
    for parts in (("set", "train"), ("set", "a.png"), ("train", "set", "a.png"), ("a.png",)):
        assert rule.apply(parts) is None
    assert PathRule().apply(("b", "a.png")) == os.path.join("b", "a.png")
    assert str(rule) == "read below imgs/, its first set/train/ left out"
    assert str(PathRule()) == "read from --images" and str(PathRule("imgs")) == "read below imgs/"


def chosen(folder: Path, *paths, names: tuple[str, ...] = ("set", "imgs", "set/imgs")) -> ImageRoot:
    search = RootSearch(folder, names)
    for row, path in enumerate(paths):
        search.look("a.json", row, path)
    return search.choose()


@pytest.mark.parametrize("folders", [0, 1, 2, 3, None], ids=str)
def test_every_number_of_leading_folders_that_the_root_ends_with_is_left_out(tmp_path, folders):
    root = tmp_path / "x" / "y" / "z"
    touch(root, "b/a.png", "c.png")
    parts = root.parts[1:]  # without the root of the file system
    parts = parts if folders is None else parts[len(parts) - folders :]
    front = "".join(f"{name}/" for name in parts)
    found = chosen(root, f"{front}b/a.png", f"{front}c.png")
    assert found.rule == PathRule("", parts)
    assert found.locate(f"{front}b/a.png") == str(root / "b/a.png")
    assert found.locate(f"{front}c.png") == str(root / "c.png")


@pytest.mark.parametrize(
    ("below", "paths", "rule"),
    [
        ("", ["set/imgs/b/a.png"], PathRule()),
        ("set", ["imgs/b/a.png"], PathRule()),
        ("", ["imgs/b/a.png"], PathRule("set")),
        ("", ["b/a.png"], PathRule("set/imgs")),
        ("set", ["b/a.png"], PathRule("imgs")),
        ("set", ["set/imgs/b/a.png"], PathRule("", ("set",))),
        ("set", ["set/b/a.png"], PathRule("imgs", ("set",))),
        ("set/imgs", ["set/imgs/b/a.png"], PathRule("", ("set", "imgs"))),
    ],
)
def test_the_root_may_be_given_at_any_level(tmp_path, below, paths, rule):
    touch(tmp_path, "set/imgs/b/a.png")
    found = chosen(tmp_path / below, *paths)
    assert found.rule == rule
    assert found.locate(paths[0]) == str(tmp_path / below / (rule.apply(Path(paths[0]).parts) or ""))


def test_the_rule_of_most_paths_is_chosen_and_the_simplest_among_equals(tmp_path):
    root = tmp_path / "set"
    touch(root, "a.png", "imgs/a.png", "imgs/b.png", "set/c.png", "c.png")
    assert chosen(root, "a.png").rule == PathRule()
    most = chosen(root, "a.png", "b.png", "none.png")
    assert (most.rule, most.example) == (PathRule("imgs"), "a.json, row 0")
    assert chosen(root, "none.png", "b.png").example == "a.json, row 1"
    assert chosen(root, "set/c.png").rule == PathRule()
    touch(root, "set/imgs/d.png", "imgs/d.png")
    assert chosen(root, "set/d.png").rule == PathRule("imgs", ("set",))
    # Of rules for one path each, the simpler one wins, whichever row comes first.
    touch(root, "x.png", "set/imgs/y.png")
    assert chosen(root, "set/x.png", "b.png").rule == PathRule("imgs")
    assert chosen(root, "y.png", "b.png").rule == PathRule("imgs")


def test_links_do_not_hide_how_the_root_ends(tmp_path):
    touch(tmp_path, "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for front in ("real", "link"):
        assert chosen(tmp_path / "link", f"{front}/a.png").rule == PathRule("", (front,))


def test_a_search_says_what_it_looked_for(tmp_path):
    (tmp_path / "imgs").mkdir()
    search = RootSearch(tmp_path, ("imgs", "set"), field="file_path")
    for row, path in enumerate([5, "../x.png", "b/a.png", "c.png"]):
        search.look("a.json", row, path)
    assert search.looked_at == 2 and not search.has_found
    message = (
        f"--images {tmp_path}: missing image: none of 2 images looked for is there; a.json, row 2 (counting from 0), field "
        f"file_path names {tmp_path}/b/a.png, which was also looked for below imgs, set; correct --images"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        search.choose()
    touch(tmp_path, "c.png")
    search.look("a.json", 3, "c.png")
    assert search.has_found and search.choose().rule == PathRule()
    nothing = RootSearch(tmp_path, ("imgs",), follow_symlinks=True).choose()
    assert nothing == ImageRoot(str(tmp_path), ("imgs",), follow_symlinks=True)
    for wrong, message in ((tmp_path / "c.png", "is a file"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(ValueError, match=f"--images .* {message}; expected the folder that holds the images"):
            RootSearch(wrong, ())


def test_a_path_that_another_rule_finds_is_refused_unless_it_is_the_same_image(tmp_path):
    touch(tmp_path, "a.png", "imgs/b.png")
    root = chosen(tmp_path, "b.png")
    assert root.locate("b.png") == str(tmp_path / "imgs/b.png")
    error = refused(root.locate, "a.png", "img_path")
    assert (error.field, error.reason) == ("img_path", "another path rule")
    assert error.problem == (
        f"'a.png' is the file {tmp_path}/a.png when read from --images; a.json, row 0 was found when read below imgs/, by "
        "which this is missing"
    )
    touch(tmp_path, "b.png")
    (tmp_path / "b.png").write_text("another picture")
    assert f"by which this is {tmp_path}/imgs/b.png" in refused(root.locate, "b.png").problem
    (tmp_path / "b.png").write_bytes((tmp_path / "imgs/b.png").read_bytes())
    assert root.locate("b.png") == str(tmp_path / "imgs/b.png")
    assert root.locate("none\\c.png") == str(tmp_path / "imgs/none/c.png")
    plain = chosen(tmp_path, "a.png")
    assert plain.locate("b.png") == str(tmp_path / "b.png")  # a direct hit
    (tmp_path / "imgs/e.png").write_text("e")
    assert refused(plain.locate, "e.png").reason == "another path rule"


def test_a_literal_backslash_comes_before_a_separator(tmp_path):
    touch(tmp_path, "b/a.png", "b\\a.png")
    root = ImageRoot(str(tmp_path))
    assert root.locate("b\\a.png") == str(tmp_path / "b\\a.png")
    (tmp_path / "b\\a.png").unlink()
    assert root.locate("b\\a.png") == str(tmp_path / "b/a.png")


def test_links_may_lead_out_only_if_allowed(tmp_path):
    touch(tmp_path, "in/a.png", "out.png")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "c.png").symlink_to(tmp_path / "out.png")
    root = ImageRoot(str(tmp_path / "in"))
    assert root.locate("b.png") == str(tmp_path / "in/b.png")
    error = refused(root.locate, "c.png")
    assert error.reason == "path leaves the image root" and f"a link to {tmp_path}/out.png" in error.problem
    followed = ImageRoot(str(tmp_path / "in"), follow_symlinks=True)
    assert followed.locate("c.png") == str(tmp_path / "in/c.png")


def png(size: tuple[int, int] = (4, 6), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def test_an_image_is_read_as_it_is(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert ImageRoot(str(tmp_path)).read("a.png") == png() == image_files.decode(png())


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "letter.png", "imgs/found.png")
    (tmp_path / "cut.png").write_bytes(png((40, 60))[:-30])
    (tmp_path / "large.png").write_bytes(png((13_300, 13_300), "1"))
    root = ImageRoot(str(tmp_path))
    for path, reason, problem in (
        ("none.png", "missing image", f"expected the file {tmp_path}/none.png, which does not exist"),
        ("imgs", "missing image", f"expected the file {tmp_path}/imgs, which does not exist"),
        ("letter.png/a.png", "missing image", "which does not exist"),
        ("a\nb.png", "missing image", r"a\nb.png, which does not exist"),
        ("letter.png", "corrupt image", "cannot be decoded: it is not an image"),
        ("cut.png", "corrupt image", "cannot be decoded: "),
        ("large.png", "image too large", "13,300 x 13,300 pixels"),
    ):
        error = refused(root.read, path, "file_path")
        assert (error.field, error.reason) == ("file_path", reason) and problem in error.problem
    assert "not an image" not in refused(root.read, "cut.png").problem
    ruled = chosen(tmp_path, "found.png")
    assert "(a.json, row 0 was found when read below imgs/)" in refused(ruled.read, "none.png").problem

    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    error = refused(root.read, "cut.png")
    assert (error.reason, error.problem) == ("unreadable image", f"{tmp_path}/cut.png: Permission denied")
