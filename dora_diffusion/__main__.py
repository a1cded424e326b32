"""``python -m dora_diffusion`` is the ``dora-diffusion`` command."""

import sys

from dora_diffusion.cli.main import main

sys.exit(main())
