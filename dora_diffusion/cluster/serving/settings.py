"""Settings of a server of images."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.cli.settings import Model
from dora_diffusion.config.fields import flag, require
from dora_diffusion.system import is_address


@dataclass(frozen=True, kw_only=True)
class ServingSettings(Model):
    """Settings of a server of images.

    Raises:
        ConfigError: If a value is invalid.
    """

    adapters: list[Path] = flag(
        [],
        "Folders of adapter files and runs, rescanned while it serves. Default: none, the base "
        "alone.",
        metavar="FOLDER",
    )
    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(8000, "Port.", least=1, most=65535)
    token_file: Path | None = flag(
        None,
        "File with the token that requests must send; or set DORA_DIFFUSION_TOKEN. Required with a "
        "--host that others reach.",
    )
    address: str = flag("local", "Ray cluster: local starts one, auto finds one.")
    replicas: int = flag(1, "Processes with the base in memory.", least=1)
    replica_gpus: float | None = flag(
        None,
        "GPUs of a replica, or the share of one. Default: the GPUs divided by the replicas, at "
        "most one.",
        least=0,
    )
    batch_size: int = flag(8, "Most images at once.", least=1)
    window: float = flag(
        0.05, "Seconds that a request waits for others to share its batch.", least=0, most=10
    )
    queue: int = flag(64, "Most requests that wait; further ones get 429.", least=1)
    timeout: float = flag(120.0, "Seconds until a request gets 504.", above=0, most=86400)
    adapter_memory: float = flag(
        2000.0,
        "Most MB that loaded adapters take in each replica; the least recently used are dropped.",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        host, address, gpus = self.host, self.address, self.replica_gpus
        require(is_address(host), f"host is {host!r}; it must be an address or a name", "host")
        require(
            gpus is None or gpus <= 1 or gpus.is_integer(),
            f"replica_gpus is {gpus}; it must be a share of one, such as 0.5, or a whole number",
            "replica_gpus",
        )
        require(
            "://" not in address,
            f"address is {address}; run serve on a node of the cluster, with --address auto",
            "address",
        )

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def application(self) -> str:
        """Name of the application, unique on a cluster because the port is exclusive."""
        return f"dora-diffusion-{platform.node()}-{self.port}"

    @property
    def adapter_bytes(self) -> int:
        """Most bytes of loaded adapters in each replica."""
        return math.ceil(self.adapter_memory * 1e6)
