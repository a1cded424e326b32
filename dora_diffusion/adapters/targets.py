"""Selection of the layers to adapt, by named presets and glob patterns of module paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from dora_diffusion.adapters.kinds import can_adapt, is_wrapped

_ATTENTION = r"to_q|to_k|to_v|to_out\.0"
_ANY_ATTENTION = (
    rf".*\b(attn[12]?|attention)\.({_ATTENTION})"
    r"|.*\battn\.(add_[qkv]_proj|to_add_out|to_qkv_mlp_proj|to_out)"
)
_FEED_FORWARD = (
    r".*\b(ff\.net\.(0\.proj|2)|feed_forward\.w[123])|.*\bff(_context)?\.linear_(in|out)"
)
# Z-Image's embedders of patches and captions, whose inputs are the tokens of all rows of a batch.
_TOKENS_OF_ALL_ROWS = r"(all_x_embedder|cap_embedder)\."
# conv_in and conv_out are in "full" only: their four channels on one side limit the rank to few.
_CONV = r"(^|.*\.)(resnets\.\d+\.conv(1|2|_shortcut)|(down|up)samplers\.\d+\.conv|proj_in|proj_out)"

# Preset -> (pattern of the path, class of layer; None: any class except nn.Embedding).
_PATTERNS: dict[str, list[tuple[str, type[nn.Module] | None]]] = {
    "cross-attention": [(rf".*\battn2\.({_ATTENTION})", nn.Linear)],
    "attention": [(_ANY_ATTENTION, nn.Linear)],
    "attention+conv": [(_ANY_ATTENTION, nn.Linear), (_CONV, nn.Conv2d)],
    "attention+ff": [(_ANY_ATTENTION, nn.Linear), (_FEED_FORWARD, nn.Linear)],
    "full": [(rf"(?!{_TOKENS_OF_ALL_ROWS}).*", None)],
    # SDXL only (B-LoRA, arXiv:2403.14572), 80 layers each: other families lack this attention.
    "b-lora-content": [(rf"up_blocks\.0\.attentions\.0\..*\battn[12]\.({_ATTENTION})", nn.Linear)],
    "b-lora-style": [(rf"up_blocks\.0\.attentions\.1\..*\battn[12]\.({_ATTENTION})", nn.Linear)],
    "text-encoder-attention": [(r".*\bself_attn\.(q|k|v|out)_proj", nn.Linear)],
    "text-encoder": [(r".*\b(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])", nn.Linear)],
    "token-embedding": [(r".*\btoken_embedding", nn.Embedding)],
}


class TargetError(ValueError):
    """A preset or pattern matches no layer of the model."""


def _matches(target: str, path: str, module: nn.Module) -> bool:
    if target not in _PATTERNS:
        return fnmatchcase(path, target)
    is_table = isinstance(module, nn.Embedding)
    return any(
        re.fullmatch(pattern, path) and (isinstance(module, kind) if kind else not is_table)
        for pattern, kind in _PATTERNS[target]
    )


def match_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the paths of the layers that match any of the targets, in model order.

    Args:
        model: Any module tree.
        targets: Preset names, or glob patterns such as ``"*.attn2.to_k"`` in which ``*`` also
            matches dots. ``"full"`` excludes ``nn.Embedding``; name it by a pattern or preset.

    Raises:
        TargetError: If a target matches no layer, or a layer whose forward another tool has
            wrapped.
    """
    for path, module in model.named_modules():
        if is_wrapped(module) and any(_matches(target, path, module) for target in targets):
            raise TargetError(
                f"{path} cannot be adapted: another tool has wrapped its forward; attach adapters "
                "before that tool hooks the model"
            )
    candidates = {
        path: module for path, module in model.named_modules() if path and can_adapt(module)
    }
    for target in targets:
        if not any(_matches(target, path, module) for path, module in candidates.items()):
            raise TargetError(_nothing_matches(target, model, list(candidates)))
    return [
        path
        for path, module in candidates.items()
        if any(_matches(target, path, module) for target in targets)
    ]


def require_rows(paths: Iterable[str]) -> None:
    """Check that all layers see each row of a batch by itself, as the rows of a pack need.

    Raises:
        TargetError: If a layer sees the tokens of all rows in one dimension.
    """
    if layers := [path for path in paths if re.match(_TOKENS_OF_ALL_ROWS, path)]:
        raise TargetError(
            f"targets: {', '.join(layers)} cannot be trained in a pack, since its input joins "
            "the tokens of all rows of a batch; leave it out of targets"
        )


def first_naming(targets: Iterable[str], path: str, module: nn.Module) -> str:
    """Return the first target that matches a layer or the end of its path; empty if none does.

    Patterns of `AdapterConfig.rank_pattern` are matched this way: ``"to_k"`` also means
    ``"*.to_k"``.
    """
    matches = (t for t in targets if _matches(t, path, module) or fnmatchcase(path, f"*.{t}"))
    return next(matches, "")


def check_pattern(
    setting: str, targets: Collection[str], layers: Iterable[Mapping[str, nn.Module]]
) -> None:
    """Check that each target is the first match of at least one adapted layer.

    Args:
        setting: Name of the setting, for the message.
        targets: Targets, of which the first match of a layer counts.
        layers: Adapted layers of each model, by path.

    Raises:
        TargetError: If a target is not; names the nearest paths if it matches no layer.
    """
    modules = [pair for group in layers for pair in group.items()]
    used = {first_naming(targets, *pair) for pair in modules}
    for target in (target for target in targets if target not in used):
        if any(first_naming([target], *pair) for pair in modules):
            raise TargetError(
                f"{setting}: {target!r} has no effect, since patterns before it match all of its "
                "layers and the first match counts; move it to the front, or leave it out"
            )
        near = ", ".join(_nearest(target, [path for path, _ in modules]))
        raise TargetError(f"{setting}: {target!r} names no adapted layer; the nearest are {near}")


def _nearest(target: str, paths: Iterable[str]) -> list[str]:
    """Return the patterns most similar to a target among the starts and ends of the paths."""
    names: dict[str, str] = {}
    for segments in (path.split(".") for path in paths):
        for split in range(1, len(segments)):
            start, end = ".".join(segments[:split]), ".".join(segments[split:])
            names |= {start: f"{start}.*", end: end}
        names[".".join(segments)] = ".".join(segments)
    query = target.replace("*", "").strip(".")
    return [names[name] for name in get_close_matches(query, sorted(names), n=3, cutoff=0)]


def _nothing_matches(target: str, model: nn.Module, paths: list[str]) -> str:
    kind = "preset" if target in _PATTERNS else "pattern"
    there = ", ".join(paths[:3]) + (f", ... ({len(paths)} in all)" if len(paths) > 3 else "")
    layers = [(path, model.get_submodule(path)) for path in paths]
    presets = [name for name in _PATTERNS if any(_matches(name, *layer) for layer in layers)]
    return (
        f"the {kind} {target!r} matches no layer of {type(model).__name__}; it has the layers "
        f"{there or 'none that can be adapted'}. Its presets are {', '.join(presets) or 'none'}."
    )


def is_conv(module: nn.Module) -> bool:
    """Return whether a layer uses the rank of convolutions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d)
