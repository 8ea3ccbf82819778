import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from data_scripts.dad.json_files import to_lines
from data_scripts.dad.report import describe_captions, describe_regions
from data_scripts.dad.reporting.report_page import Heading, Paragraph, Picture, Table, to_html, to_markdown
from mra.common.files import write_whole
from tests.helpers.dad import load_config
from tests.helpers.dad_readers import draw_person, make_sources, run, write_config, write_generated


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder after all stages that read images."""
    root = make_sources(tmp_path_factory.mktemp("report"), ("blip", "grounding"))
    filtering = {"min_contrast": 5, "min_colour": 50, "min_sharpness": 50, "min_detail": 0, "max_detail": 100_000}
    path = write_config(root, filter=filtering, report={"images": 10, "note": "Weights are <random>."})
    images = {number: draw_person(number) for number in range(8)}
    images[3] = Image.new("RGB", (32, 64), (90, 120, 60))
    write_generated(load_config(str(path)), images)
    write_whole(
        root / "work/prompts/prompts.jsonl",
        to_lines({"prompt_id": number, "prompt": "a man", "source_row": 0} for number in range(9)),
    )
    run(path, "filter", "caption", "ground", "report")
    return root / "work"


def test_counts_of_every_stage(work):
    facts = json.loads((work / "report/report.json").read_text())
    rows = [row for file in (work / "sda").iterdir() for row in json.loads(file.read_text())]
    boxes = sum(len(row["boxes"]) for row in rows)
    assert facts["counts"] == {
        "prompts": 9,
        "images": 8,
        "kept": 7,
        "captioned": 7,
        "annotated": 7,
        "boxes": boxes,
    }
    assert facts["regions"]["boxes"] == boxes and sum(facts["regions"]["boxes_per_image"].values()) == 7
    assert facts["models"]["caption.model"].endswith("blip")
    distances = facts["distances"]
    assert (distances["kept"]["num_generated"], distances["kept"]["num_target"]) == (7, 10)
    assert (distances["generated"]["num_generated"], distances["target halves"]["num_target"]) == (8, 5)


def test_page_holds_what_a_reader_needs(work):
    for name in ("index.md", "index.html"):
        page = (work / "report" / name).read_text()
        assert "7" in page and "87.50%" in page and "10.63%" in page and "fewer images than features" in page
        for path in re.findall(r'src="([^"]+)"|\]\(([^)]+\.jpg)\)', page):
            with Image.open(work / "report" / "".join(path)) as image:
                assert image.width > 100
    assert "Weights are &lt;random&gt;." in page and "images.jpg" in page and "../filter/dropped.jpg" in page
    HTMLParser().feed(page)


def test_words_and_boxes_are_counted():
    captions = describe_captions(["A man in a red shirt.", "a man", "a man"])
    assert captions["captions"] == 3 and captions["different_captions"] == 2 and captions["different_words"] == 5
    assert captions["words_per_caption"] == {"mean": pytest.approx(10 / 3), "least": 2, "most": 6}
    assert captions["frequent_words"][:2] == [("a", 4), ("man", 3)]
    row = {
        "caption": "a man in a red shirt",
        "phrases": ["a red shirt"],
        "boxes": [[0.5, 0.5, 0.5, 0.4]],
        "logits": [0.6],
    }
    regions = describe_regions([row, {"caption": "a man", "phrases": [], "boxes": [], "logits": []}])
    assert regions["boxes"] == 1 and regions["phrases_named"] == 3 and regions["boxes_per_image"] == {0: 1, 1: 1}
    assert regions["kinds"] == {"upper": {"boxes": 1, "mean_area": pytest.approx(0.2), "mean_score": 0.6}}


def test_blocks_in_both_languages():
    blocks = [
        Heading("A & B", 1),
        Paragraph("x < y", True),
        Table(["a", "n"], [["p|q", "1"]]),
        Picture("f.jpg", "pic"),
    ]
    assert to_markdown(blocks) == (
        "# A & B\n\n> **Note.** x < y\n\n| a | n |\n| --- | ---: |\n| p\\|q | 1 |\n\n![pic](f.jpg)\n\n*pic*\n"
    )
    page = to_html(blocks)
    assert "<title>A &amp; B</title>" in page and "<p class=note>x &lt; y</p>" in page
    assert "<td>p|q</td><td class=number>1</td>" in page and 'src="f.jpg"' in page
