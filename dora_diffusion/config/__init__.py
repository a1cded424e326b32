"""The settings of an adapter and of a training run: one setting is one field.

::

    subject    what is trained on     train     TrainConfig, all of the three, and its checks
    learning   how it is learned      adapter   AdapterConfig
    run        the run around it      derived   what follows from settings
    fields     what a field says      file      YAML
    flag_map   flags of Diffusers' scripts    presets   settings that belong together
    elsewhere  names with another meaning     problems  errors that are reported together

Nothing here imports torch, and a name is imported when it is first used.
"""

from __future__ import annotations

from dora_diffusion.lazy import lazy_names

_HOMES, __getattr__ = lazy_names(__name__, __file__)
__all__ = list(_HOMES)
