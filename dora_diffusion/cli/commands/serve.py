"""``dora-diffusion serve``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dora_diffusion.cli.settings import Model
from dora_diffusion.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Model):
    """Settings of ``serve``."""

    adapters: list[Path] = flag(
        [],
        "Folders of adapter files and runs, rescanned while it serves. Default: none, the base "
        "alone.",
        metavar="FOLDER",
    )
    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(8000, "Port.")
    token_file: Path | None = flag(
        None,
        "File with the token that requests must have; or set DORA_DIFFUSION_TOKEN. Required with a "
        "--host that others reach.",
    )
    address: str = flag("local", "Ray cluster: local starts one, auto finds one.")
    replicas: int = flag(1, "Processes with the base in memory.")
    replica_gpus: float | None = flag(
        None,
        "GPUs of a replica, or the share of one. Default: the GPUs divided by the replicas, at "
        "most one.",
    )
    batch_size: int = flag(8, "Most images at once.")
    window: float = flag(0.05, "Seconds that a request waits for others to share its batch.")
    queue: int = flag(64, "Most requests that wait; further ones get 429.")
    timeout: float = flag(120.0, "Seconds until a request gets 504.")
    adapter_memory: float = flag(
        2000.0,
        "Most MB that loaded adapters take in each replica; the least recently used are dropped.",
        above=0,
    )


SETTINGS = ServeSettings


def run(args: ServeSettings) -> int:
    """Serve until it is interrupted."""
    from dora_diffusion.cluster.serving import deploy
    from dora_diffusion.cluster.serving.catalogue import Catalogue

    names = {field.name for field in fields(deploy.Deployment)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= {
        "adapters": tuple(folder.resolve() for folder in args.adapters),
        "adapter_memory": math.ceil(args.adapter_memory * 1e6),
        "capacity": args.queue,
        "token": deploy.read_token(args.token_file),
    }
    deploy.Deployment(**values)
    values["base"] = replace(args.base_model, path=_base(args))
    catalogue = Catalogue(args.adapters)
    deployment = deploy.Deployment(**values, options=args.model_options)
    deploy.serve(deployment, catalogue)
    return 0


def _base(args: ServeSettings) -> str:
    """The base as replicas find it, which is fetched once from a hub.

    Raises:
        ModelNotFoundError: If there is none.
    """
    from dora_diffusion.models.locate import is_embedded, resolve_folder

    path = Path(args.base).expanduser()
    if path.exists():
        return str(path.resolve())
    if not is_embedded(args.base):
        resolve_folder(args.base_model)
    return str(args.base)
