"""mra/web/view.py: what is shown, and that nothing a file or a person is called becomes part of the page."""

import base64
import io
import re
from pathlib import Path

import torch
from PIL import Image

from mra.gallery.types import BuildReport, GalleryStats, Hit, SearchResult, Skipped
from mra.retrieval.explain import Explanation, PhraseScore, WordAttention
from mra.web import view as app_view


EVIL = "\"><script>alert('x')</script>"
IMAGE = Image.new("RGB", (40, 80), (200, 30, 30))


def make_hit(rank=1, **changes):
    values = {"rank": rank, "key": f"a/{rank}.jpg", "path": Path("/secret/place"), "score": 0.84, "similarity": 0.5}
    values |= {"likely": True, "camera": "c1", "time": "2026-01-31T08:00:00", "metadata": {"note": "door"}}
    return Hit(**values | changes)


def make_explanation(*words):
    heatmap = torch.tensor([[0.7], [0.2]])
    return Explanation("text", 0.9, tuple(WordAttention(word, heatmap, 0.1, word == "a") for word in words), heatmap)


def make_stats(**changes):
    values = {
        "uri": "",
        "collection": "",
        "images": 1200,
        "cameras": {"c1": 1, "c2": 2, "": 3},
        "fields": {},
        "roots": [],
    }
    values |= {"first_time": None, "last_time": None, "copies": 0, "model": None, "fingerprint": None, "tokens": 0}
    return GalleryStats(**values | {"embedding_dim": None, "disk_bytes": {}, "calibration": None} | changes)


def test_the_title_says_what_the_gallery_holds():
    assert "1,200 images from 2 cameras</p>" in app_view.show_title(make_stats())
    times = {"first_time": "2026-01-31T00:00:00", "last_time": "2026-02-01T08:15:30"}
    assert "cameras, 2026-01-31 to 2026-02-01 08:15:30" in app_view.show_title(make_stats(**times))
    assert "is empty" in app_view.show_title(None) and "is empty" in app_view.show_title(make_stats(images=0))


def test_hits_are_buttons_that_say_which_image_they_are():
    shown = app_view.show_hits(
        [make_hit(), make_hit(2, score=0.031, likely=False), make_hit(3, score=None, likely=None)], [IMAGE] * 3
    )
    assert re.findall(r'data-key="([^"]*)"', shown) == ["a/1.jpg", "a/2.jpg", "a/3.jpg"]
    assert "1. 84%" in shown and "2. 3%" in shown and "3. similarity 0.50" in shown
    assert shown.count("probably not in the gallery") == 1 and shown.count("mra-unlikely") == 1
    assert "secret" not in shown
    data = re.search(r"data:image/jpeg;base64,([^\"]*)", shown)[1]
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (192, 384) and picture.getpixel((90, 90))[0] > 150
    assert 'src=""' in app_view.show_hits([make_hit()], [None])


def test_the_status_tells_the_likely_from_the_unlikely():
    timings = {"encode": 0.1, "search": 0.2}
    likely = app_view.show_status(SearchResult([make_hit()], 0.5, timings, reranked=8))
    assert "1 image in 0.30 s, 8 re-ranked." in likely and "mra-warning" not in likely
    unlikely = app_view.show_status(SearchResult([make_hit(likely=False)], 0.5, timings, reranked=8))
    assert (
        "Probably not in the gallery: no image reaches the threshold of 50%" in unlikely and "mra-warning" in unlikely
    )
    early = app_view.show_status(SearchResult([make_hit()], 0.5, timings, reranked=128, matched=24))
    assert "128 re-ranked (24 matched)." in early
    assert "similarity only" in app_view.show_status(SearchResult([make_hit(score=None, likely=None)], 0.5, timings))
    assert "No image matches the filters" in app_view.show_status(SearchResult([], 0.5, timings))


def test_a_result_is_shown_with_its_words():
    shown = app_view.show_detail(make_hit(), IMAGE, make_explanation("a", "red", "coat"))
    assert re.findall(r"<figcaption>([^<]*)", shown) == ["image", "all words", "a", "red", "coat"]
    assert shown.count("mra-faint") == 1 and "Result 1: 84.0% match" in shown
    assert "camera: c1 · time: 2026-01-31 08:00 · note: door" in shown and "secret" not in shown
    without = app_view.show_detail(make_hit(), IMAGE, None)
    assert re.findall(r"<figcaption>([^<]*)", without) == ["image"] and "Search by text" in without


def test_phrases_are_bars():
    shown = app_view.show_phrases([PhraseScore("red coat", 0.25), PhraseScore("hat", 1.0)])
    assert re.findall(r"width:([\d.]+)%", shown) == ["25.0", "100.0"] and "25.0%</span>" in shown


def test_a_report_lists_what_was_left_out():
    report = BuildReport(
        added=3, unchanged=1, skipped=[Skipped(f"{n}.jpg", "damaged") for n in range(25)], seconds=1.25
    )
    shown = app_view.show_report(report, ["notes.txt"])
    assert "3 added, 1 unchanged</b> in 1.2 s" in shown and "0.jpg: damaged" in shown and "and 6 more" in shown
    assert "mra-warning" not in app_view.show_report(BuildReport(added=1))


def test_names_and_words_stay_text():
    hit = make_hit(key=EVIL, camera=EVIL, time=EVIL, metadata={EVIL: EVIL})
    pages = [
        app_view.show_hits([hit], [IMAGE]),
        app_view.show_detail(hit, IMAGE, make_explanation(EVIL)),
        app_view.show_phrases([PhraseScore(EVIL, 0.5)]),
        app_view.show_report(BuildReport(skipped=[Skipped(EVIL, EVIL)], unmatched=[EVIL]), [EVIL]),
        app_view.show_message(EVIL),
        app_view.show_title(make_stats(first_time=EVIL, last_time=EVIL)),
    ]
    for shown in pages:
        assert "<script" not in shown and '"&gt;' not in shown.replace("&quot;&gt;", "") and "&lt;script&gt;" in shown


def test_nothing_is_fetched_from_outside():
    assert not re.search(r"url\(|@import|https?:", app_view.CSS)
