"""Single-file checkpoints: the same model as the folder they were made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_diffusion.config.base import BaseModel
from dora_diffusion.config.families import UnsupportedModelError
from dora_diffusion.export import export_checkpoint
from dora_diffusion.formats.files.stream import TensorReader
from dora_diffusion.models.load import load_components
from dora_diffusion.models.text import encode_prompts
from dora_diffusion.numerics import quantised
from dora_diffusion.numerics.quantised import PackedWeight, quantise


def single_file(folder: Path, tmp_path: Path) -> Path:
    """The folder's weights in the original layout."""
    return export_checkpoint(folder, [], tmp_path / "model.safetensors")


@pytest.mark.parametrize("is_given", [True, False], ids=["given", "packaged"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd1-inpainting"])
def test_a_single_file_loads_as_its_folder(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, is_given: bool
) -> None:
    """Of the released models' structure, and by the package's configurations of any."""
    folder = request.getfixturevalue("deep" if is_given else "shallow")(family)
    expected = load_components(folder)
    request.getfixturevalue("tiny_released" if not is_given else "tmp_path")
    loaded = load_components(
        BaseModel(single_file(folder, tmp_path), model_config=folder if is_given else None)
    )
    assert loaded.family is expected.family
    assert loaded.prediction_type == expected.prediction_type
    assert loaded.zeros_for_empty_prompt == expected.zeros_for_empty_prompt
    assert type(loaded.sampling_scheduler()) is type(expected.sampling_scheduler())
    for name, module in expected.modules().items():
        state = loaded.modules()[name].state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(state[key], tensor), f"{name}.{key}"
    conditioning = [encode_prompts(model, ["a photo of sks dog"]) for model in (loaded, expected)]
    assert torch.equal(conditioning[0].encoder_hidden_states, conditioning[1].encoder_hidden_states)


def test_half_precision_keeps_the_fragile_vae_exact(sdxl_folder: Path, tmp_path: Path) -> None:
    file = single_file(sdxl_folder, tmp_path)
    loaded = load_components(BaseModel(file, model_config=sdxl_folder), dtype=torch.float16)
    assert loaded.denoiser.dtype == torch.float16
    assert {encoder.dtype for encoder in loaded.text_encoders} == {torch.float16}
    expected = load_components(sdxl_folder).vae.state_dict()
    assert all(torch.equal(loaded.vae.state_dict()[key], value) for key, value in expected.items())
    other = load_components(
        BaseModel(file, model_config=sdxl_folder, vae=sdxl_folder), dtype=torch.float16
    )
    assert other.vae.dtype == torch.float32


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_weight_is_quantised_from_a_few_of_its_rows_at_a_time(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """To the codes of the whole weight, wherever its rows lie in the file."""
    folder = request.getfixturevalue(f"{family}_folder")
    dense, file = load_components(folder, dtype=torch.float16), single_file(folder, tmp_path)
    expected = {
        name: quantise(weight, "nf4").tensors
        for part, module in dense.modules().items()
        for name, weight in ((f"{part}.{key}", w) for key, w in module.named_parameters())
        if name.endswith("weight") and weight.ndim in (2, 4)
    }
    most = 1000
    monkeypatch.setattr(quantised, "_CHUNK", most)
    read_rows = TensorReader.rows

    def rows(reader: TensorReader, name: str, start: int, stop: int) -> torch.Tensor:
        found = read_rows(reader, name, start, stop)
        assert found.numel() <= max(most, found[0].numel())
        return found

    monkeypatch.setattr(TensorReader, "rows", rows)
    options = {"quantize": "nf4", "quantize_convolutions": True}
    for base in (BaseModel(folder, **options), BaseModel(file, model_config=folder, **options)):
        loaded = load_components(base, dtype=torch.float16)
        packed = {
            f"{part}.{key}": weight
            for part, module in loaded.modules().items()
            for key, weight in module.named_parameters()
            if isinstance(weight, PackedWeight)
        }
        assert len(packed) > 50
        for name, weight in packed.items():
            for each, tensor in weight.tensors.items():
                assert torch.equal(tensor, expected[name][each]), name


def test_markers_of_v_prediction_win_over_the_configuration(
    sdxl_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(sdxl_folder, tmp_path / "v")
    path = folder / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
    # The configuration that is given says epsilon; the file itself knows better.
    loaded = load_components(BaseModel(single_file(folder, tmp_path), model_config=sdxl_folder))
    assert loaded.prediction_type == "v_prediction"
    assert loaded.sampling_scheduler("euler").config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.rescale_betas_zero_snr is True


def test_models_of_another_kind_of_schedule_are_refused(sdxl_folder: Path, tmp_path: Path) -> None:
    file = single_file(sdxl_folder, tmp_path)
    save_file({**load_file(file), "edm_mean": torch.zeros(4)}, file)
    with pytest.raises(UnsupportedModelError, match="edm_mean: it has another kind of noise"):
        load_components(BaseModel(file, model_config=sdxl_folder))


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, adapter)
    with pytest.raises(UnsupportedModelError, match="an adapter or a bare UNet"):
        load_components(adapter)
    adapter.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=r"adapter\.safetensors could not be loaded"):
        load_components(adapter)
