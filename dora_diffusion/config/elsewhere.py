"""Settings whose name another trainer uses with another meaning or unit.

``elsewhere.json`` has each setting with the trainer and the difference, and where it depends on
others, the settings and values with which the same value does something else there. A note says it
where the setting is given; the pages for users of that trainer list it. Facts: sd-scripts'
``train_network.py``, Diffusers' DreamBooth LoRA scripts (those of flow models for ``logit_mean``),
OneTrainer's ``TrainConfig.py``, ai-toolkit's ``config_modules.py`` and ``scheduler.py``, of 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dora_diffusion.config.fields import Need, Setting, shown
from dora_diffusion.config.file import read_facts


class Difference(NamedTuple):
    """Meaning of a setting's name in another trainer.

    Attributes:
        trainer: The other program.
        text: What it does there, and what it does here; the program is the subject.
        needs: The same value does something else if one of them holds; empty: with every value but
            the default.
        least: The least value that does something else; None: any.
    """

    trainer: str
    text: str
    needs: tuple[Need, ...] = ()
    least: float | None = None


def _difference(
    trainer: str,
    text: str,
    only_with: Mapping[str, Sequence[Any]] | None = None,
    least: float | None = None,
) -> Difference:
    needs = (Need(name, tuple(values)) for name, values in (only_with or {}).items())
    return Difference(trainer, text, tuple(needs), least)


DIFFERENCES = {name: _difference(**facts) for name, facts in read_facts("config/elsewhere").items()}
"""Setting -> what its name means elsewhere."""


def notes(config: Any, known: Iterable[Setting], given: Iterable[str]) -> list[str]:
    """List what given settings mean in other trainers, where the same value does something else.

    Args:
        config: The settings with their values.
        known: Description of each.
        given: Names that the user gave.
    """
    lines = []
    moved = {s.name: v for s in known if (v := getattr(config, s.name)) and v != s.default}
    for name in sorted(moved.keys() & DIFFERENCES.keys() & set(given)):
        trainer, text, needs, least = DIFFERENCES[name]
        if least is not None and moved[name] < least:
            continue
        # Other commands lack the settings of training that it needs.
        differs = (hasattr(config, need.setting) and need(config) is None for need in needs)
        if not needs or any(differs):
            lines.append(f"{name} is {shown(moved[name])}; {trainer} {text}")
    return lines
