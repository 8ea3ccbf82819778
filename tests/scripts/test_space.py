"""recipes/space: what a Hub Space is made of, and that app.py starts from it alone."""

import configparser
import shutil

import pytest
import yaml

from tests.helpers.app import ROOT, make_gallery, running
from tests.helpers.runs import free_port


SPACE = ROOT / "recipes" / "space"


def setup_lines(section: str, name: str) -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup[section][name].split("\n")[1:]


def front_matter() -> dict:
    return yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_a_space_installs_what_setup_cfg_says():
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == setup_lines("options", "install_requires") + setup_lines("options.extras_require", "search")
    wanted = next(line for line in setup_lines("options.extras_require", "app") if line.startswith("gradio"))
    assert wanted == f"gradio>={front_matter()['sdk_version'].rpartition('.')[0]},<7"
    assert front_matter()["sdk"] == "gradio" and (ROOT / front_matter()["app_file"]).is_file()


@pytest.mark.app
def test_a_space_starts_from_its_files_and_variables_alone(tmp_path):
    """The files that docs/quickstart.md uploads, in an empty folder; no argument, as on the Hub."""
    from gradio_client import Client

    make_gallery(tmp_path)
    space = tmp_path / "space"
    shutil.copytree(ROOT / "mra", space / "mra", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*_mra.py"), ROOT / "app.py", *SPACE.iterdir()]:
        shutil.copy(path, space)
    port = free_port()
    env = {"SPACE_ID": "user/space", "GRADIO_SERVER_PORT": str(port), "MRA_GALLERY": "gallery.db"}
    env |= {
        "PYTHONDONTWRITEBYTECODE": "",
        "MRA_MODEL": str(tmp_path / "model"),
        "MRA_IMAGES": str(tmp_path / "people"),
    }
    with running([front_matter()["app_file"]], port, space, tmp_path / "space.log", env) as url:
        client = Client(url, verbose=False)
        found = client.predict("a red coat", None, [], "", "", "", 0.5, True, 5, api_name="/search")
        client.close()
    assert len(found["hits"]) == 5 and (space / "gallery.db").is_dir()
    assert (space / "mra" / "web" / "__pycache__").is_dir()  # its own modules were run, not those of the project
