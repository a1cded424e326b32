"""Requests: prompts, scenes that answer them, and seeds of their own."""

from __future__ import annotations

import pytest

from dora_diffusion.lab.judges.requests import GROUPS, toy_requests
from dora_diffusion.lab.toy.benchmark_subjects import SUBJECTS, find_subject
from dora_diffusion.lab.toy.shapes import CLASSES


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda s: s.name)
def test_requests_ask_for_what_their_scenes_show(subject) -> None:
    requests = toy_requests(subject, "zwx thing", (3, 4))
    assert len({request.seed for request in requests}) == len(requests)
    per_round = len(requests) // 2
    assert [r.prompt for r in requests[:5]] == [r.prompt for r in requests[per_round:][:5]]
    for request in requests:
        has_token = "zwx" in request.prompt
        assert has_token == (request.group in ("subject", "pose"))
        assert (request.scene.subject == subject.sample.subject) == has_token
        assert request.wanted.get("background", request.scene.background) == (
            request.scene.background
        )
    new = {request.scene.background for request in requests if request.group == "subject"}
    assert new == set(subject.held_out_backgrounds)
    others = {r.scene.subject.kind for r in requests if r.group == "others"}
    assert others == set(CLASSES) - {subject.sample.subject.kind}
    assert {request.group for request in requests} == set(GROUPS)


def test_prompts_read_like_captions() -> None:
    prompts = {r.prompt for r in toy_requests(find_subject("cross_mug"), "sks mug", [0])}
    assert {
        "a photo of a sks mug in the sea",
        "a photo of a sks mug on the left in a studio",
        "a photo of a small sks mug in a studio",
        "a photo of a mug in the sea",
    } <= prompts
