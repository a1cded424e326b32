"""Files of other methods than LoRA and DoRA, recognised by their keys and refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# Ends of keys, without `lora_unet_NAME.` or a module's path -> what the file holds. LyCORIS 4.1
# writes LoHa to T-LoRA so, PEFT 0.21 IA3, OFT, VeRA and DoRA's relatives.
_METHODS: Mapping[str, re.Pattern[str]] = {
    method: re.compile(rf".*\.(?:{ends})")
    for method, ends in {
        "LoHa": r"hada_\w+(\..+)?",
        "LoKr": r"lokr_\w+(\..+)?",
        "OFT or BOFT": r"oft_\w+(\..+)?|boft_\w+(\..+)?|rescale",
        "IA3": r"on_input|ia3_l(\..+)?",
        "GLoRA": r"(a1|a2|b1|b2|bm)\.weight",
        "T-LoRA": r"lambda_layer|[pq]_layer\.weight|base_(q|p|lambda)",
        "DyLoRA in the form that it trains in": r"(up|down)_list\.\d+",
        "VeRA": r"vera_\w+(\..+)?",
        "DeLoRA": r"delora_\w+(\..+)?",
        "full differences": "diff",
        "differences of biases": "diff_b",
        "LoRA biases": r"lora_B(\.[\w-]+)?\.bias|lora_up\.bias",
        "norm weights": "w_norm|b_norm",
    }.items()
}
_BUNDLED = re.compile(r"bundle_emb\..*")
_PREFIX_TWICE = re.compile(r"(lora_unet_unet|lora_te\d?_te\d?|lora_te\d?_text_encoder)_.*")
# What one can do about it; merging with the program that trained it, where nothing is said.
_ADVICE = {
    "T-LoRA": "its effect changes with the timestep, so that no merged model holds it; use it in "
    "the program that trained it",
    "full differences": "add them to the base's weights, as ComfyUI, Forge and A1111 do",
    "embeddings bundled with the adapter": "save the adapter without its embeddings",
    "DyLoRA in the form that it trains in": "save it with LyCORIS or sd-scripts, which write a "
    "plain LoRA",
}
_MERGE = "merge it with the program that trained it, and use the merged model"


def other_method(keys: Collection[str]) -> str | None:
    """A sentence on what these keys belong to instead of a LoRA or DoRA, None if it is unknown."""
    if any(map(_BUNDLED.fullmatch, keys)):
        return _sentence("embeddings bundled with the adapter")
    if any(map(_PREFIX_TWICE.fullmatch, keys)):
        return (
            "its names have the component's prefix twice, as a broken converter wrote them, so "
            "that no program finds its layers; convert the file that it was made from again"
        )
    for method, pattern in _METHODS.items():
        if any(map(pattern.fullmatch, keys)):
            return _sentence(method)
    return None


def _sentence(method: str) -> str:
    return f"it holds {method}, which is no part of a LoRA or DoRA; {_ADVICE.get(method, _MERGE)}"
