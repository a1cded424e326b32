"""What checkpoints are asked, and how a sample subject is judged."""

from __future__ import annotations

from typing import Any

import pytest

from dora_diffusion.generate import SamplingSettings
from dora_diffusion.jobs.questions import ask_toy

SETTINGS = SamplingSettings(steps=2, guidance_scale=1.0, width=32, height=32)


def test_a_sample_is_judged_against_its_truth() -> None:
    questions = ask_toy("bolt_mug", "sks mug", SETTINGS)
    assert (questions.subjects, len(questions.prompts)) == (5, 11)
    assert all("sks mug" in prompt for prompt in questions.prompts[:5])
    assert not any("sks" in prompt for prompt in questions.prompts[5:])
    from dora_diffusion.evaluation.toy.requests import toy_requests, true_images
    from dora_diffusion.toy.benchmark_subjects import find_subject

    def truth(name: str) -> list[Any]:
        requests = toy_requests(find_subject(name), "sks mug", [0], ("subject", "others"))
        groups = [[one for one in requests if one.group == g] for g in ("subject", "others")]
        return true_images(groups[0][:5] + groups[1][:6], 64)

    right, wrong = truth("bolt_mug"), truth("heart_teapot")
    similarities, drift = questions.judge(right, right)
    assert similarities is not None
    assert len(similarities) == 5
    assert sum(similarities) / 5 == pytest.approx(0.95, abs=0.05)
    assert drift == pytest.approx(0, abs=1e-5)
    similarities, drift = questions.judge(wrong, right)
    assert similarities is not None
    assert sum(similarities) / 5 < 0.3
