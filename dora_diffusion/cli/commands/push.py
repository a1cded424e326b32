"""``dora-diffusion push``."""

from __future__ import annotations

from dora_diffusion.cli.console.progress import tell
from dora_diffusion.cli.settings import PushSettings

SETTINGS = PushSettings


def run(args: PushSettings) -> int:
    """Publish a run's output folder on the hub."""
    from dora_diffusion.export.hub import push
    from dora_diffusion.training.results.card import card_of

    tell(phase="uploading")
    adapter = args.adapter
    card = card_of(args.folder, adapter) if adapter else None
    private = not args.public
    address = push(args.folder, args.repository, private=private, adapter=adapter, card=card)
    tell(phase="uploaded", address=address)
    print(address)
    return 0
