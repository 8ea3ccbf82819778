"""mra/web/arguments.py: the environment stands in for what the command line leaves out, as on a Hub Space."""

import pytest

from mra.web.arguments import PageArguments
from mra.web.server import main


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in ("MRA_MODEL", "MRA_GALLERY", "MRA_IMAGES", "GRADIO_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_the_environment_stands_in_for_what_is_left_out(monkeypatch):
    monkeypatch.setenv("MRA_GALLERY", "x.db")
    monkeypatch.setenv("MRA_IMAGES", "people")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7000")
    arguments = PageArguments(images="mine")
    assert (arguments.gallery, arguments.images, arguments.model, arguments.port) == ("x.db", "mine", None, 7000)
    monkeypatch.delenv("GRADIO_SERVER_PORT")
    assert PageArguments().port == 7860 and PageArguments(port=80).port == 80


def test_a_page_needs_a_gallery(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "app.py: error: --gallery is missing: pass it, or set MRA_GALLERY\n"
