"""``dora-diffusion serve``."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

from dora_diffusion.cli.commands.options import add_base, add_model, model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_base(parser)
    parser.add_argument(
        "--adapters",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="Folders of adapter files and runs, rescanned while it serves. "
        "Default: none, the base alone.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, default=8000, help="Port.")
    parser.add_argument(
        "--token_file",
        type=Path,
        help="File with the token that requests must have; or set DORA_DIFFUSION_TOKEN. Required "
        "with a --host that others reach.",
    )
    parser.add_argument(
        "--address", default="local", help="Ray cluster: local starts one, auto finds one."
    )
    parser.add_argument(
        "--replicas", type=int, default=1, help="Processes with the base in memory."
    )
    parser.add_argument(
        "--replica_gpus",
        type=float,
        help="GPUs of a replica, or the share of one. Default: the GPUs divided by the replicas, "
        "at most one.",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Most images at once.")
    parser.add_argument(
        "--window",
        type=float,
        default=0.05,
        help="Seconds that a request waits for others to share its batch.",
    )
    parser.add_argument(
        "--queue",
        dest="capacity",
        type=int,
        default=64,
        help="Most requests that wait; further ones get 429.",
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="Seconds until a request gets 504."
    )
    parser.add_argument(
        "--adapter_memory",
        type=float,
        default=2000.0,
        help="Most MB that loaded adapters take in each replica; the least recently used are "
        "dropped.",
    )
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until it is interrupted."""
    from dora_diffusion.cluster.serving import deploy
    from dora_diffusion.cluster.serving.catalogue import Catalogue
    from dora_diffusion.config.fields import require

    names = {field.name for field in fields(deploy.Deployment)}
    values = {name: value for name, value in vars(args).items() if name in names}
    values |= {"adapters": tuple(folder.resolve() for folder in args.adapters)}
    memory = args.adapter_memory
    require(0 < memory < math.inf, f"adapter_memory is {memory:g}; it must be more than 0 MB")
    values |= {"adapter_memory": math.ceil(memory * 1e6)}
    values |= {"token": deploy.read_token(args.token_file)}
    deploy.Deployment(**values)
    values["base"] = _base(args)
    catalogue = Catalogue(args.adapters)
    deployment = deploy.Deployment(**values, options=model_options(args))
    deploy.serve(deployment, catalogue)
    return 0


def _base(args: argparse.Namespace) -> str:
    """The base as replicas find it, which is fetched once from a hub.

    Raises:
        ModelNotFoundError: If there is none.
    """
    from dora_diffusion.models.locate import is_embedded, resolve_folder

    path = Path(args.base).expanduser()
    if path.exists():
        return str(path.resolve())
    if not is_embedded(args.base):
        resolve_folder(args.base, revision=args.revision, variant=args.variant)
    return str(args.base)
