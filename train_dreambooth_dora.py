#!/usr/bin/env python
r"""Teach Stable Diffusion, SDXL or Z-Image a subject from a handful of photos, with DoRA.

    python train_dreambooth_dora.py --config samples/bolt_mug/config.yaml
    accelerate launch train_dreambooth_dora.py --pretrained_model_name_or_path MODEL \
        --instance_data_dir PHOTOS --instance_prompt "a photo of a sks dog" --output_dir OUTPUT

All flags: ``--help``. The code is in ``dora_diffusion.training``.
"""

import sys

from dora_diffusion.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
