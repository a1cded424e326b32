"""Settings of the workers of a large task."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.config.command import CommandSettings, group
from dora_diffusion.config.fields import flag, when

_RAY = when(
    lambda config: config.address is not None,
    "no address is given: there is one worker, this process",
)


@dataclass(frozen=True, kw_only=True)
class Share(CommandSettings):
    """Share of a node for each worker."""

    workers: int | None = flag(
        None,
        "Most workers at once. Default: as many as the nodes have room for.",
        least=1,
        needs=(_RAY,),
    )
    num_cpus: float = flag(1.0, "Processors of each worker.", least=0, needs=(_RAY,))
    num_gpus: float | None = flag(
        None,
        "GPUs of each worker; 0.5 has two share one. Default: 1 where the cluster has GPUs.",
        least=0,
        needs=(_RAY,),
    )


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(CommandSettings):
    """Settings of the workers of a large task."""

    address: str | None = flag(
        None,
        "Ray cluster: local (workers on this machine), auto (the cluster that runs here), "
        "HOST:PORT or ray://HOST:PORT. Default: no Ray, one after another in this process.",
    )
    share: Share = group(Share)
