"""Opening a gallery: which model, which place, which process."""

import subprocess
import sys
from pathlib import Path

import pytest

from mra.gallery import Gallery
from tests.helpers.galleries import encoder_of, write_pictures


def test_a_gallery_of_another_model_is_refused(model, other_model, tmp_path):
    write_pictures(tmp_path / "people", 2)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(other_model)) as gallery:
        for ask in (lambda: gallery.search("a man"), lambda: gallery.build(tmp_path / "people")):
            with pytest.raises(ValueError, match=r"was built with .* their embeddings cannot be compared"):
                ask()
        assert gallery.stats().images == 2
        assert gallery.remove(where='key != "x"') == 2
    with Gallery(tmp_path / "g.db", device="cpu") as gallery:
        assert gallery.encoder.name == model


HOLD = "import sys, milvus_lite.db as m; d = m.MilvusLite(sys.argv[1]); print('held', flush=True); sys.stdin.read(); d.close()"


def test_a_second_process_is_told_why_it_must_wait(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "g.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            ValueError, match=r"g\.db is open in a different process, and an embedded gallery serves one"
        ):
            Gallery(tmp_path / "g.db")
    with Gallery(tmp_path / "g.db") as one, Gallery(tmp_path / "g.db") as two:  # one process may open it twice
        assert (len(one), len(two)) == (0, 0)


@pytest.mark.parametrize(
    "uri, message",
    [("gallery", "must be a path ending in .db"), ("nowhere/g.db", "does not exist"), ("file.db", "is a file")],
)
def test_places_that_cannot_be_opened(model, tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    Path("file.db").write_text("")
    write_pictures(tmp_path / "people", 1)
    with pytest.raises(ValueError, match=message):
        Gallery(uri, encoder=encoder_of(model)).build(tmp_path / "people")


def test_asking_makes_no_gallery(model, tmp_path):
    with Gallery(tmp_path / "typo.db", encoder=encoder_of(model)) as gallery:
        with pytest.raises(ValueError, match=r"there is no gallery at .*typo\.db: build one with"):
            gallery.search("a man")
        with pytest.raises(ValueError, match="there is no gallery at"):
            gallery.add(tmp_path)
    named = pytest.raises(ValueError, match=r"no gallery other at .*typo\.db: .* --collection other --images")
    with Gallery(tmp_path / "typo.db", encoder=encoder_of(model), collection="other") as gallery, named:
        gallery.stats()
    assert not (tmp_path / "typo.db").exists()


def test_importing_the_package_needs_no_extra():
    loaded = "print([n for n in ('pymilvus', 'gradio') if n in sys.modules])"
    code = f"import sys, mra.retrieval; {loaded}; from mra.gallery import Gallery"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert run.stdout == "[]\n"
