"""The web page in a process of its own, on a small gallery."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from mra.gallery.gallery import Gallery
from tests.helpers.galleries import encoder_of, save_tiny_model, write_pictures
from tests.helpers.runs import free_port


ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600  # a busy machine takes long to import everything


def make_gallery(root: Path) -> Path:
    """A tiny model, 9 pictures of three cameras and their gallery; gives its path."""
    model = save_tiny_model(root / "model")
    keys = write_pictures(root / "people", 9)
    rows = [
        {"path": key, "camera": key.split("/")[0], "time": f"2026-01-0{n + 1}T08:00"} for n, key in enumerate(keys)
    ]
    with Gallery(root / "gallery.db", encoder=encoder_of(model)) as gallery:
        gallery.build(root / "people", rows)
    return root / "gallery.db"


def running_page(gallery: Path, log: Path, *arguments: str, env: dict[str, str] | None = None):
    """Runs app.py as a user would; gives its address once it answers."""
    port = free_port()
    command = [str(ROOT / "app.py"), "--gallery", str(gallery), "--port", str(port), *arguments]
    return running(command, port, ROOT, log, env or {})


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path, log: Path, env: dict[str, str]) -> Iterator[str]:
    """Runs a page in a folder, with the address that a port of this machine has; see `running_page`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(300)
