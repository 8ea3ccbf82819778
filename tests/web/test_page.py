"""mra/web/page.py: the page's searches, explanations and indexing, on a small gallery."""

import dataclasses
import json
import zipfile

import pytest
from PIL import Image

from mra.gallery.gallery import Gallery
from mra.gallery.where import parse_where
from mra.retrieval.explain import explain_pair
from mra.web.page import MAX_TEXT, Page, Query, join_filters
from mra.web.uploads import UploadLimits
from tests.helpers.galleries import draw_picture, encoder_of, save_tiny_model, write_pictures


NO_FILTER = ([], "", "", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def page(model, tmp_path):
    write_pictures(tmp_path / "people", 6)
    rows = [{"path": f"cam_{n % 3}/{n:03d}{s}", "camera": f"c{n % 3}", "time": f"2026-01-0{n + 1}T08:00"} for n, s in
            enumerate((".jpg", ".png", ".bmp", ".webp", ".jpg", ".png"))]  # fmt: skip
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people", rows)
        yield Page(gallery, [tmp_path / "people"], UploadLimits(images=5))


def search(page, text="a red coat", image=None, filters=NO_FILTER, threshold=0.5, rerank=True, top=5):
    return page.query(Query(text, image, *filters, threshold, rerank, top))


def test_a_query_passes_everything_on(page):
    result = search(
        page, filters=(["c0", "c1"], "2026-01-02", "2026-01-04T08:00", 'key != "cam_1/001.png"'), threshold=0.2
    )
    assert [hit.key for hit in result.hits] == ["cam_0/003.webp"] and result.threshold == 0.2
    assert search(page).reranked == 6 and len(search(page).hits) == 5
    assert search(page, rerank=False).reranked == 0
    assert page.cameras() == ["c0", "c1", "c2"] and page.stats().images == 6


def test_an_image_can_be_searched_by(page, tmp_path):
    result = search(page, text="", image=str(tmp_path / "people" / "cam_1" / "001.png"))
    assert result.hits[0].key == "cam_1/001.png" and result.hits[0].score is None
    both = search(page, text="a red coat", image=str(tmp_path / "people" / "cam_1" / "001.png"))
    assert both.hits[0].score is not None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"text": " "}, "description and image are empty"),
        ({"text": "x" * (MAX_TEXT + 1)}, "1,001 characters, expected at most 1,000"),
        ({"filters": ([], "yesterday", "", "")}, "is not a time"),
        ({"filters": ([], "", "", "__import__('os')")}, "is not a comparison"),
        ({"filters": ([], "", "", 'camera == "c1") or (key == "x"')}, "cannot be parsed"),
    ],
)
def test_what_cannot_be_asked_is_told(page, changes, problem):
    with pytest.raises(ValueError, match=problem):
        search(page, **changes)


def test_filters_are_joined():
    assert join_filters([], None, " ", "") is None
    where = join_filters(['c"1', "c'2"], "2026-01-01", "", ' camera == "x" or key == "y" ')
    assert where == """camera in ['c"1', "c'2"] and time >= '2026-01-01' and (camera == "x" or key == "y")"""
    assert parse_where(where, {"camera": "text", "time": "time", "key": "text"})


def test_an_explanation_reads_the_cached_tokens(page):
    image, found = page.explain("a red coat", "cam_0/000.jpg")
    encoder = page.gallery.encoder
    expected = explain_pair(encoder.model, encoder.processor, "a red coat", image)
    assert found.match_probability == pytest.approx(expected.match_probability, abs=1e-3)  # cached in float16
    assert page.explain("", "cam_0/000.jpg")[1] is None
    with pytest.raises(ValueError, match="no image of the gallery has the key '/etc/passwd'"):
        page.explain("a red coat", "/etc/passwd")


def test_phrases_are_scored(page):
    scores = page.score_phrases("red coat, , black backpack", "cam_0/000.jpg")
    assert [score.phrase for score in scores] == ["red coat", "black backpack"]
    expected = page.gallery.match(["red coat", "black backpack"], ["cam_0/000.jpg"])[:, 0]
    assert [score.match_probability for score in scores] == pytest.approx(expected.tolist())
    for phrases, key, problem in (
        ("a", "", "choose one first"),
        (" ,", "cam_0/000.jpg", "expected 1 to 10 phrases"),
        ("a," * 11, "cam_0/000.jpg", "expected 1 to 10 phrases"),
    ):
        with pytest.raises(ValueError, match=problem):
            page.score_phrases(phrases, key)


def test_a_picture_that_is_gone_leaves_a_gap(page, tmp_path):
    hits = search(page).hits
    hits[1].path.unlink()
    assert [image is None for image in page.thumbnails(hits)] == [False, True, False, False, False]


def test_an_upload_is_copied_and_then_deleted(page, tmp_path):
    folder = tmp_path / "from the browser"
    folder.mkdir()
    draw_picture(50).save(tmp_path / "a.png")
    with zipfile.ZipFile(folder / "people.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "in/a.png")
        archive.writestr("people.csv", "path,camera\nin/a.png,gate\n")
        archive.writestr("notes.txt", "x")
    steps = []
    report, ignored = page.index_upload([str(folder / "people.zip")], lambda done, total: steps.append((done, total)))
    assert report.added == 1 and ignored == ["notes.txt"] and steps[-1] == (1, 1)
    assert not folder.exists()
    (hit,) = search(page, filters=(["gate"], "", "", "")).hits
    assert hit.key.startswith("upload 20") and hit.key.endswith("/in/a.png")
    assert page.gallery.image(hit.key).size == draw_picture(50).size


def test_a_refused_upload_adds_nothing(page, tmp_path):
    folder = tmp_path / "from the browser"
    folder.mkdir()
    with zipfile.ZipFile(folder / "people.zip", "w") as archive:
        archive.writestr("../../evil.png", "x")
    with pytest.raises(ValueError, match="leads out of its folder"):
        page.index_upload([str(folder / "people.zip")], None)
    assert len(page.gallery) == 6 and not folder.exists() and not list(tmp_path.rglob("evil.png"))
    for number in range(6):
        folder.mkdir(exist_ok=True)
        draw_picture(number).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match="more than 5 images"):
        page.index_upload([str(path) for path in sorted(folder.iterdir())], None)
    with pytest.raises(ValueError, match="choose images"):
        page.index_upload(None, None)


def test_only_allowed_folders_are_indexed(page, tmp_path):
    Image.new("RGB", (20, 40)).save(tmp_path / "people" / "new.png")
    assert page.index_folder(str(tmp_path / "people"), None).added == 1
    for typed in (str(tmp_path), "/etc", str(tmp_path / "people" / "..")):
        with pytest.raises(ValueError, match="is not in an allowed folder"):
            page.index_folder(typed, None)
    with pytest.raises(ValueError, match="write the path"):
        page.index_folder(" ", None)


def test_an_empty_gallery_says_so(model):
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        page = Page(gallery, [], UploadLimits())
        assert page.stats() is None and page.cameras() == []
        with pytest.raises(ValueError, match="gallery is empty: add images first"):
            search(page)


def test_what_a_program_gets_is_plain(page):
    assert json.dumps(page.to_json(search(page)))
    hit = page.to_json(search(page))["hits"][0]
    assert "path" not in hit and {"rank", "key", "score", "similarity", "likely", "camera", "time", "metadata"} == set(
        hit
    )


def test_the_page_asks_with_every_field_of_a_query(page):
    """The layout names its fields as `Query` does, in its order, which is that of the endpoint's arguments."""
    gradio = pytest.importorskip("gradio", reason="the web page is tested by make test-app")
    from mra.web.blocks import add_fields

    with gradio.Blocks():
        _, fields = add_fields(page)
    assert list(fields) == [field.name for field in dataclasses.fields(Query)]
