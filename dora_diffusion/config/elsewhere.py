"""Settings whose name another trainer uses with another meaning or unit.

``elsewhere.json`` lists them with the trainer and the difference. If the difference depends on
other settings, it also lists the values of these with which the results differ. Runs print a note
about such a setting, and the pages for users of that trainer list it. Facts: sd-scripts'
``train_network.py``, Diffusers' DreamBooth LoRA scripts (for ``logit_mean`` the scripts of flow
models), OneTrainer's ``TrainConfig.py``, ai-toolkit's ``config_modules.py`` and ``scheduler.py``,
of 2026.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dora_diffusion.config.fields import Need, Setting, shown
from dora_diffusion.config.file import read_facts


class Difference(NamedTuple):
    """Meaning of a setting's name in another trainer.

    Attributes:
        trainer: Name of the other program.
        text: Difference between the two programs; the other program is its grammatical subject.
        needs: Conditions, any of which makes the same value differ in effect; empty: every value
            but the default does.
        least: Least value that differs in effect; None: any.
        usual: Value that other trainers use with the meaning it has here, which needs no note.
    """

    trainer: str
    text: str
    needs: tuple[Need, ...] = ()
    least: float | None = None
    usual: float | None = None


def _difference(
    trainer: str,
    text: str,
    only_with: Mapping[str, Sequence[Any]] | None = None,
    least: float | None = None,
    usual: float | None = None,
) -> Difference:
    needs = (Need(name, tuple(values)) for name, values in (only_with or {}).items())
    return Difference(trainer, text, tuple(needs), least, usual)


DIFFERENCES = {name: _difference(**facts) for name, facts in read_facts("config/elsewhere").items()}
"""Setting -> meaning of its name in another trainer."""


def notes(config: Any, known: Iterable[Setting], names: Iterable[str]) -> list[str]:
    """List settings whose value has another effect in another trainer, with the difference.

    Args:
        config: The settings with their values.
        known: Descriptions of the settings.
        names: Names of the settings that the user set.
    """
    lines = []
    changed = {s.name: v for s in known if (v := getattr(config, s.name)) and v != s.default}
    for name in sorted(changed.keys() & DIFFERENCES.keys() & set(names)):
        trainer, text, needs, least, usual = DIFFERENCES[name]
        if changed[name] == usual or (least is not None and changed[name] < least):
            continue
        # Other commands do not have the settings of training that it depends on.
        differs = (hasattr(config, need.setting) and need(config) is None for need in needs)
        if not needs or any(differs):
            lines.append(f"{name} is {shown(changed[name])}; {trainer} {text}")
    return lines
