"""The judges that ship, on fresh renders."""

from __future__ import annotations

from pathlib import Path

import torch

from dora_diffusion.toy.instrument import Instrument, load_instrument
from lab.pretrain.instrument import measure_classifier, measure_embedder, save_instrument


def test_judges_know_the_world_on_fresh_renders(instrument: Instrument) -> None:
    accuracy = measure_classifier(instrument.classifier, 150)
    assert min(accuracy[name] for name in ("kind", "color", "pattern", "background")) >= 0.95
    subjects = measure_embedder(instrument.embedder, 60)
    assert subjects["same_subject"] >= 0.8
    assert subjects["other_subject"] <= 0.3
    assert subjects["retrieval"] >= 0.9


def test_judges_that_were_written_open_again(instrument: Instrument, tmp_path: Path) -> None:
    save_instrument(instrument, tmp_path / "judges")
    opened = load_instrument(tmp_path / "judges")
    assert opened.measured == instrument.measured
    for name in ("classifier", "embedder"):
        written = getattr(instrument, name).state_dict()
        for key, tensor in getattr(opened, name).state_dict().items():
            assert torch.equal(tensor, written[key]), key
