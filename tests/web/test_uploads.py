"""mra/web/uploads.py: archives that try to get out, hide or explode."""

import io
import stat
import struct
import zipfile

import pytest
from PIL import Image

from mra.web.uploads import Unpacker, UploadLimits, inside_any, safe_parts


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((8, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def unpack(tmp_path, *files, **limits):
    folder = tmp_path / "in" / "out"
    folder.mkdir(parents=True, exist_ok=True)
    return Unpacker(folder, UploadLimits(**limits)).unpack(files)


def test_pictures_and_metadata_are_taken(tmp_path):
    members = {"a/b.png": picture(), "c.JPG": b"x", "a/people.csv": b"path", "notes.txt": b"", "__MACOSX/a/b.png": b""}
    (tmp_path / "single.webp").write_bytes(b"y")
    found = unpack(tmp_path, make_zip(tmp_path / "a.zip", members | {"a/.hidden.png": b""}), tmp_path / "single.webp")
    folder = tmp_path / "in" / "out"
    assert found.images == [folder / "a" / "b.png", folder / "c.JPG", folder / "single.webp"]
    assert found.images[0].read_bytes() == picture()
    assert found.metadata == folder / "a" / "people.csv"
    assert found.ignored == ["notes.txt", "__MACOSX/a/b.png", "a/.hidden.png"]
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert written == {"a/b.png", "a/people.csv", "c.JPG", "single.webp"}


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "C:a.png", "\\\\host\\share\\a.png"]
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="leads out of its folder"):
        unpack(tmp_path, make_zip(tmp_path / "a.zip", {name: picture()}))
    assert not [path for path in (tmp_path / "in").rglob("*") if path.is_file()]


def test_names_on_windows_are_read_as_folders():
    assert safe_parts("a\\b.png") == safe_parts("a/b.png") == ("a", "b.png")
    with pytest.raises(ValueError, match="leads out"):
        safe_parts("")


def test_links_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match=r"a.zip holds the link 'a.png'"):
        unpack(tmp_path, tmp_path / "a.zip")


def test_limits_hold_whatever_the_archive_says_of_itself(tmp_path):
    big = make_zip(tmp_path / "big.zip", {f"{number}.png": bytes(3 << 20) for number in range(4)})
    assert big.stat().st_size < 1 << 16  # a bomb
    with pytest.raises(ValueError, match=r"'0.png' is larger than 2 MiB"):
        unpack(tmp_path / "1", big, image_bytes=2 << 20)
    with pytest.raises(ValueError, match="larger than 7 MiB unpacked"):
        unpack(tmp_path / "2", big, bytes=7 << 20)
    with pytest.raises(ValueError, match="more than 3 pictures"):
        unpack(tmp_path / "3", big, images=3)
    assert len(unpack(tmp_path / "4", big).images) == 4

    content = bytearray(make_zip(tmp_path / "liar.zip", {"0.png": bytes(3 << 20)}).read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, directory + 24, 10)  # "ten bytes unpacked"
    (tmp_path / "liar.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be unpacked|larger than 2 MiB"):
        unpack(tmp_path / "5", tmp_path / "liar.zip", image_bytes=2 << 20)


def test_what_cannot_be_used_is_told(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"no.zip cannot be unpacked .*: expected a ZIP archive"):
        unpack(tmp_path, tmp_path / "no.zip")
    with pytest.raises(ValueError, match="holds no picture"):
        unpack(tmp_path, make_zip(tmp_path / "empty.zip", {"a.txt": b""}))
    with pytest.raises(ValueError, match=r"two CSV files, a.csv and b.csv"):
        unpack(tmp_path, make_zip(tmp_path / "two.zip", {"a.csv": b"", "b.csv": b"", "c.png": b""}))
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'c.png' twice"):
        unpack(tmp_path / "again", tmp_path / "c.png", make_zip(tmp_path / "c.zip", {"c.png": b""}))


def test_folders_outside_the_roots_are_refused(tmp_path):
    root, other = tmp_path / "root", tmp_path / "root2"
    for folder in (root / "a", other):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(other)
    assert inside_any(root / "a" / ".." / "a", [root]) == (root / "a").resolve()
    for typed in (root / "..", root / "link", other, "/etc", root / "nowhere", root / "a" / ".." / ".."):
        with pytest.raises(ValueError, match="is not in an allowed folder"):
            inside_any(typed, [root])
    with pytest.raises(ValueError, match="start the page with --images FOLDER"):
        inside_any(root, [])
