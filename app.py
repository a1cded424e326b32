#!/usr/bin/env python
"""The app: ``python app.py``, then open the address it prints. The same as ``dora-diffusion app``.

The code is in ``dora_diffusion.studio.app``.
"""

import sys

from dora_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
