"""Web page to search a gallery of people, as a Hub Space or on this machine starts it.

    python app.py --model outputs/sample/finetune/best --gallery outputs/sample/gallery.db

On a Space the environment says the same: MRA_MODEL, MRA_GALLERY, MRA_IMAGES. The page itself is mra/web.
"""

import signal
import sys

from mra.web.server import main


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what was uploaded is deleted then too
    main()
