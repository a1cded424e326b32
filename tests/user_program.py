"""A user's program; `test_public_api` has mypy check it strictly."""

from pathlib import Path

from torch import nn

import dora_diffusion as dd

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8))
report = dd.inject_adapters(model, dd.AdapterConfig(targets=("full",), rank=4))
path: Path = dd.save_adapter(model, "out")
try:
    result = dd.train(dd.TrainConfig(instance_data_dir="photos", instance_prompt="a sks dog"))
except (dd.ConfigError, dd.PhotoError, dd.TrainingError) as error:
    print(error)
components = dd.load_components("embedded:tiny-sd")
with dd.disabled(components.denoiser):
    images = dd.generate_images(components, "a dog", [0], dd.SamplingSettings(steps=20))
dd.export_checkpoint("embedded:tiny-sd", path, "merged").resolve()
dd.TrainConfig(instance_data_dir=path, output_dir=path, dataset_config="subjects.yaml")
text: str = dd.TrainConfig(output_dir=path).output_dir
dd.ImageRequest("a dog", 0, (path, 0.5))
