"""Programs that compute an adapter file as it was trained. See docs/understand/programs.md.

Every verdict is proven by a test against the program itself (diffusers, PEFT, LyCORIS), or was seen
when the program was run (ComfyUI, Forge, A1111's network code, InvokeAI, sd-scripts); tests restate
the published formulas of ComfyUI and A1111. Each layout has its own; here is what they share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dora_diffusion.config.wording import counted, listing
from dora_diffusion.formats.adapter.metadata import APPROXIMATES, APPROXIMATION_ERROR

COLUMNS = (
    "diffusers",
    "PEFT",
    "LyCORIS",
    "ComfyUI and Forge",
    "A1111",
    "InvokeAI",
    "sd-scripts",
)
# Verdicts: in short before the colon; "-" where it is not known.
EXACT, NOT_CHECKED = "exact", "-"
PLAIN = "wrong: the magnitudes are ignored, so it acts as a plain LoRA"
INPUT_NORMS = "wrong: it computes the norms per input"
NOT_FOR_IT = "convert: the file is not made for it"
OTHER_BASES = "exact for its base: wrong with any other"
UNKNOWN = "convert: its key format is not one that we have checked"
PREFIX = 'LycorisNetwork.LORA_PREFIX = "lora_unet", without which it finds no layer'
BYPASS = "ComfyUI's bypass mode, which patches no weights, ignores the magnitudes"
# The error of an approximation that is none, but for the rounding of its numbers.
_ROUNDING = 1e-5


def table(kinds: Mapping[str, Sequence[str]]) -> Mapping[str, Mapping[str, str]]:
    """Return a table: content of a file -> program -> verdict.

    Args:
        kinds: Of each, the verdicts in the order of `COLUMNS`; the last one is that of the rest.
    """
    return {
        kind: {name: row[min(i, len(row) - 1)] for i, name in enumerate(COLUMNS)}
        for kind, row in kinds.items()
    }


@dataclass(frozen=True)
class Approximation:
    """Original that a file approximates.

    Attributes:
        of: ``"DoRA"`` or ``"LoRA"``, ``"tuned model"``, ``"sum of the adapters"``.
        error: Relative error of the change of all layers; None if the file does not say it.
    """

    of: str
    error: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"which approximates the {self.of}"
        share = f"{self.error:.1%}" if self.error >= 0.001 else "less than 0.1%"
        return f"which is off the {self.of} by {share}"

    def qualify(self, tools: Mapping[str, str], method: str) -> dict[str, str]:
        """The verdicts on a file that is one: exact for what it holds, and how far off that is."""
        exact = f"exact for this {method}, {self}"
        return {
            program: exact + verdict.removeprefix(EXACT)
            if verdict.partition(":")[0] == EXACT
            else verdict
            for program, verdict in tools.items()
        }


def stated_approximation(extra: Mapping[str, str]) -> Approximation | None:
    """Return the approximation that our file's metadata state; None if it is exact."""
    if not (of := extra.get(APPROXIMATES)):
        return None
    try:
        error = float(extra.get(APPROXIMATION_ERROR, ""))
    except ValueError:
        return Approximation(of, None)
    return Approximation(of, error) if error > _ROUNDING else None


def some_layers(names: Collection[str]) -> str:
    """``"5 layers (a, b, c and 2 more)"``."""
    return f"{counted(len(names), 'layer')} ({listing(names, 3)})"
