"""The settings of an adapter and of a training run: one setting is one field.

::

    subject    model, subjects, images        train     TrainConfig, all of the three, with checks
    learning   adapter, optimizer, loss       adapter   AdapterConfig
    run        device, samples, output        derived   defaults that depend on other settings
    fields     description of a setting       file      YAML
    flag_map   flags of other trainers        presets   settings for one purpose
    exclusions  what excludes what            problems  errors that are reported together
    features   optional features of a run
    images     an image that is wanted        foreign   files of other trainers

Nothing here imports torch, and a name is imported when it is first used.
"""

from __future__ import annotations

from dora_diffusion.lazy import lazy_names

_HOMES, __getattr__ = lazy_names(__name__, __file__)
__all__ = list(_HOMES)
