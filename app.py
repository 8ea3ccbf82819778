"""Start the web page that searches a gallery of people, on a Hub Space or locally.

    python app.py --model outputs/sample/finetune/best --gallery outputs/sample/gallery.db

On a Space the environment variables MRA_MODEL, MRA_GALLERY and MRA_IMAGES set the same. The page itself is in mra/web.
"""

import signal
import sys

from mra.web.server import main


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a normal exit, which also deletes uploads
    main()
