"""What a build encodes, copies and skips, and when keys conflict."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import images_mra
from mra.gallery import Gallery, indexing
from mra.gallery.searching import open_query_image
from mra.retrieval import encode_images
from tests.helpers.galleries import contents, draw_picture, encoder_of, write_pictures


def test_only_what_is_new_or_changed_is_encoded(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 9)
    first = gallery.build(tmp_path / "people", batch_size=4)
    assert (first.added, first.encoded, first.skipped, len(gallery)) == (9, 9, [], 9)
    write_pictures(tmp_path / "people", 3, first=9)
    draw_picture(99).save(tmp_path / "people" / keys[0])
    again = gallery.build(tmp_path / "people", batch_size=4)
    assert (again.added, again.changed, again.unchanged, again.encoded) == (3, 1, 8, 4)
    assert gallery.build(tmp_path / "people").encoded == 0
    assert len(gallery) == 12
    assert gallery.verify().problems == []


def test_embeddings_are_those_of_evaluation(gallery, model, tmp_path):
    keys = write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people", batch_size=8)
    encoder = encoder_of(model)
    images = [Image.open(tmp_path / "people" / key) for key in keys]
    expected = encode_images(encoder.model, encoder.processor, images, batch_size=8)
    found = {record.key: record.embedding for record in gallery._state.store.records(embeddings=True)}
    for key, embedding in zip(keys, expected.embeds, strict=True):
        torch.testing.assert_close(torch.tensor(found[key]), embedding, rtol=0, atol=1e-6)


def test_unreadable_images_are_reported_and_skipped(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 4)
    (people / "empty.jpg").write_bytes(b"")
    (people / "letter.png").write_text("no picture")
    data = (people / keys[0]).read_bytes()
    whole = io.BytesIO()
    draw_picture(5, (200, 200)).save(whole, "png")
    (people / "cut.png").write_bytes(whole.getvalue()[:300])
    (people / "notes.txt").write_text("not meant as a picture")
    (people / ".hidden.jpg").write_bytes(data)
    (tmp_path / "outside.jpg").write_bytes(data)
    (people / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    report = gallery.build(people)
    assert report.added == 4
    reasons = {skipped.key: skipped.reason for skipped in report.skipped}
    assert sorted(reasons) == ["cut.png", "empty.jpg", "letter.png", "link.jpg"]
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["letter.png"] == "not an image that Pillow can read"
    assert reasons["cut.png"].startswith("the image is damaged")
    assert "outside the folder" in reasons["link.jpg"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_their_exif_says(model, tmp_path, orientation):
    upright = draw_picture(3, (40, 90))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what exif_transpose will undo
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "people").mkdir()
    stored.save(tmp_path / "people" / "turned.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "people" / "turned.png")).tobytes() == upright.tobytes()
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        assert gallery.image("turned.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(model, tmp_path, mode):
    people = tmp_path / "people"
    people.mkdir()
    if mode == "I;16":
        Image.fromarray((np.arange(64 * 32, dtype=np.uint16) * 30).reshape(64, 32)).save(people / "x.png")
    else:
        draw_picture(1).convert(mode).save(people / ("x.tif" if mode == "CMYK" else "x.png"))
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        assert gallery.build(people).added == 1
        image = gallery.image(next(iter(contents(gallery))))
        assert image.mode == "RGB"
        assert len(set(image.convert("L").tobytes())) > 1  # not all of it clipped to one grey


def test_equal_and_renamed_pictures_are_encoded_once(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 4)
    shutil.copy(people / keys[0], people / "twin.jpg")
    report = gallery.build(people)
    assert (report.added, report.encoded) == (5, 4)
    (people / keys[1]).rename(people / "renamed.png")
    report = gallery.build(people)
    assert (report.added, report.encoded, report.missing) == (1, 0, [keys[1]])
    assert gallery.build(people, prune=True).removed == 1
    assert sorted(contents(gallery)) == sorted([*(key for key in keys if key != keys[1]), "renamed.png", "twin.jpg"])


def test_two_pictures_that_change_places_are_both_right(gallery, tmp_path):
    people = tmp_path / "people"
    people.mkdir()
    for number, name in enumerate("ab"):
        draw_picture(number).save(people / f"{name}.png")
    gallery.build(people)
    before = contents(gallery)
    (people / "a.png").rename(people / "c.tmp")
    (people / "b.png").rename(people / "a.png")
    (people / "c.tmp").rename(people / "b.png")
    assert gallery.build(people).changed == 2
    after = contents(gallery)
    assert (after["a.png"][0], after["a.png"][-1]) == (before["b.png"][0], before["b.png"][-1])
    assert (after["b.png"][0], after["b.png"][-1]) == (before["a.png"][0], before["a.png"][-1])


def test_a_moved_folder_is_no_conflict_but_two_with_equal_names_are(gallery, tmp_path):
    keys = write_pictures(tmp_path / "one", 3)
    write_pictures(tmp_path / "two", 3)
    draw_picture(77).save(tmp_path / "two" / keys[0])
    gallery.build(tmp_path / "one")
    with pytest.raises(ValueError, match=r"belong to different images of .*one in this gallery: pass a prefix"):
        gallery.add(tmp_path / "two")
    assert gallery.add(tmp_path / "two", prefix="two/").added == 3
    (tmp_path / "one").rename(tmp_path / "moved")
    report = gallery.build(tmp_path / "moved")
    assert (report.unchanged, report.encoded, report.relabelled) == (3, 0, 3)
    assert gallery.search("a man", top=9).hits[0].path.exists()


def test_few_large_images_are_decoded_at_a_time(gallery, tmp_path, monkeypatch):
    sizes = [(40, 50)] * 9
    (tmp_path / "people").mkdir()
    for number, size in enumerate(sizes):
        draw_picture(number, size).save(tmp_path / "people" / f"{number}.png")
    monkeypatch.setattr(indexing, "MAX_PIXELS_HELD", 5000)
    read, encode = indexing.read_picture, gallery.encoder.encode_images
    decoded, encoded, batches = [], [], []

    def count_decoded(data):
        decoded.append(1)
        assert len(decoded) - len(encoded) <= 3 + 2  # a batch, and what waits for it
        return read(data)

    def count_encoded(images):
        encodings = encode(images)
        encoded.extend(images)
        batches.append(len(images))
        return encodings

    monkeypatch.setattr(indexing, "read_picture", count_decoded)
    monkeypatch.setattr(gallery.encoder, "encode_images", count_encoded)
    assert gallery.build(tmp_path / "people", batch_size=8).added == 9
    assert batches == [3, 3, 3]


def test_an_image_of_too_many_pixels_is_not_decoded(gallery, tmp_path, monkeypatch):
    (tmp_path / "people").mkdir()
    bomb = tmp_path / "people" / "bomb.png"
    Image.new("1", (13300, 13300)).save(bomb)
    monkeypatch.setattr(images_mra, "to_rgb", None)
    report = gallery.build(tmp_path / "people")
    assert "13,300 x 13,300 pixels" in report.skipped[0].reason
    for image in (bomb, Image.open(bomb)):
        with pytest.raises(ValueError, match="13,300 x 13,300 pixels"):
            open_query_image(image)


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_files_and_folders_have_the_permissions_of_the_user(model, tmp_path, umask, folder, file):
    write_pictures(tmp_path / "people", 2)
    before = os.umask(umask)
    try:
        with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
            gallery.build(tmp_path / "people", copy_images=True)
            gallery.remove(keys=["cam_0/000.jpg"])
        # Closed: milvus-lite compacts in the background.
        modes = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "g.db", *(tmp_path / "g.db").rglob("*")]}
    finally:
        os.umask(before)
    wrong = {str(path): oct(mode) for path, mode in modes.items() if mode != (folder if path.is_dir() else file)}
    assert wrong == {}
