"""Folders, lists of files and datasets as sources of images."""

import datasets

from tests.helpers.galleries import draw_picture, write_pictures


def test_a_list_and_a_data_set(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 3)
    paths = [tmp_path / "people" / key for key in keys]
    assert gallery.build(paths).added == 3
    dataset = datasets.Dataset.from_dict(
        {"image": [draw_picture(50), draw_picture(51)], "camera": ["c1", None], "person": [7, 8]},
        features=datasets.Features(
            {"image": datasets.Image(), "camera": datasets.Value("string"), "person": datasets.Value("int64")}
        ),
    )
    assert gallery.add(dataset, prefix="set/").added == 2
    (hit,) = gallery.search("a man", where="person == 7").hits
    assert (hit.key, hit.camera, hit.metadata) == ("set/000000", "c1", {"person": 7})
    assert gallery.image("set/000000").tobytes() == draw_picture(50).tobytes()
    assert hit.path.is_relative_to(gallery.roots[-1])
    assert gallery.add(dataset, prefix="set/").unchanged == 2
