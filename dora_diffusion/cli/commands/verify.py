"""``dora-diffusion verify``."""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.cli.console.progress import progress
from dora_diffusion.cli.settings import Merge, adapter_and_strength
from dora_diffusion.config import ConfigError
from dora_diffusion.config.fields import REQUIRED, flag

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Merge):
    """Settings of ``verify``."""

    # Behind --adapter it would be taken for one more adapter: `run` tells them apart.
    merged: str | None = flag(
        None, "The merged model: a folder or a .safetensors file.", positional=True
    )
    adapter: list[str] = flag(
        REQUIRED,
        "Adapter files or output folders; FILE:0.5 gives one its own strength. May be repeated.",
        repeated=True,
    )


SETTINGS = VerifySettings


def run(args: VerifySettings) -> int:
    """Recompute a merged model; 1 if it is not what base and adapters give."""
    from dora_diffusion.export import verify_checkpoint

    merged, adapters = _merged_and_adapters(args.merged, args.adapter)
    with progress("comparing", "B") as show:
        report = verify_checkpoint(
            merged,
            args.base_model,
            [adapter_and_strength(text) for text in adapters],
            on_progress=show,
            **args.merge_options,
        )
    print(f"{'adapted tensors':<28} {'number':>6}  {'largest':>8}  {'rounding':>8}")
    for name, kind in sorted(report.kinds.items()):
        largest, allowed = f"{kind.largest:>8.1e}", f"{kind.allowed:>8.1e}"
        print(f"{name:<28} {kind.tensors:>6}  {largest}  {allowed}  {kind.worst}")
    print(f"{report.unchanged} other tensors equal the base's, bit for bit")
    for problem in _shortened(report.problems):
        print(f"wrong: {problem}")
    print("verified" if report.ok else "NOT what this base and these adapters give", end="")
    print(
        f", assuming that this is right: {'; '.join(report.assumptions)}" * bool(report.assumptions)
    )
    return 0 if report.ok else 1


def _merged_and_adapters(merged: str | None, adapters: list[str]) -> tuple[str, list[str]]:
    """The model to prove, which is the last word of ``--adapter A B merged``, and the adapters.

    Raises:
        ConfigError: If there is only one word for both.
    """
    if merged is not None:
        return merged, adapters
    if len(adapters) < 2:
        raise ConfigError(
            "the merged model is missing: dora-diffusion verify MERGED --base BASE --adapter FILE"
        )
    return adapters[-1], adapters[:-1]


def _shortened(problems: list[str]) -> list[str]:
    """The first problems, the last (which may explain them), and how many are left out."""
    if len(problems) <= _SHOWN:
        return problems
    left_out = f"{len(problems) - _SHOWN} more like these"
    return [*problems[: _SHOWN - 1], left_out, problems[-1]]
