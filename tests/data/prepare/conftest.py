"""Toy photos with their true masks, and tiny random models of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.utils.import_utils import BACKENDS_MAPPING

from dora_diffusion.toy.benchmark_subjects import SAMPLE_BACKGROUNDS, SAMPLE_SUBJECTS
from dora_diffusion.toy.world import Scene, _paint_subject, render

SIZE = (144, 128)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "a", "an", "dog", "cat", "mug"]
WORDS += ["photo", "of", "on", "the", "red", ":", "USER"]
LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def with_scipy() -> Any:
    """Lets models be built whose loss, which nothing here computes, needs scipy."""
    return patch.dict(BACKENDS_MAPPING, scipy=(lambda: True, ""))


def true_mask(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """Share of each pixel that the subject hides: painted over white and over black."""
    width, height = size
    pixel = 2 / min(size)
    x, y = np.meshgrid(
        ((np.arange(width) + 0.5 - width / 2) * pixel).astype(np.float32),
        ((height / 2 - np.arange(height) - 0.5) * pixel).astype(np.float32),
    )
    over = [
        _paint_subject(scene, x, y, pixel, np.full((height, width, 3), v, np.float32))
        for v in (0.0, 1.0)
    ]
    hidden = 1 - (over[1] - over[0])[..., 0]
    return Image.fromarray(np.round(255 * hidden.clip(0, 1)).astype(np.uint8))


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Photos of a mug, their true masks, and a masker that knows them, mirrored too."""
    scenes = [
        SAMPLE_SUBJECTS["bolt_mug"].scene(place, seed)
        for seed, place in enumerate(SAMPLE_BACKGROUNDS)
    ]
    scenes = [replace(scene, size=0.5) for scene in scenes]
    photos = [Image.fromarray(render(scene, SIZE)) for scene in scenes]
    masks = [true_mask(scene, SIZE) for scene in scenes]
    known = {photo.tobytes(): mask for photo, mask in zip(photos, masks, strict=True)}
    known |= {
        ImageOps.mirror(photo).tobytes(): ImageOps.mirror(mask)
        for photo, mask in zip(photos, masks, strict=True)
    }
    return SimpleNamespace(
        photos=photos, masks=masks, masker=lambda image: known[image.tobytes()].copy()
    )


@pytest.fixture
def photos(toy: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder of them: 0.png to 4.png, without captions and masks."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, photo in enumerate(toy.photos):
        photo.save(folder / f"{index}.png")
    return folder


def tokenizer() -> Any:
    """A tokenizer of a few words, which begins and ends a text as BERT's does."""
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    words = tk.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    fast = tk.Tokenizer(words)
    fast.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    fast.post_processor = tk.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, sep_token="[SEP]", extra_special_tokens=["<image>"], **special
    )


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model with its processor, by the model's kind."""
    built: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in built:
            built[kind] = tmp_path_factory.mktemp("models") / kind
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                for part in BUILDERS[kind]():
                    part.save_pretrained(built[kind])
        return built[kind]

    return folder_of


def _blip() -> tuple[Any, Any]:
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = LAYERS | tokens | {"vocab_size": len(WORDS), "encoder_hidden_size": 16}
    config = BlipConfig(
        text_config=text | {"projection_dim": 16, "max_position_embeddings": 80},
        vision_config=LAYERS | {"image_size": 32, "patch_size": 8},
    )
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    return BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer())


def _clip_images() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _git() -> tuple[Any, Any]:
    from transformers import GitConfig, GitForCausalLM, GitProcessor

    vision = LAYERS | {"image_size": 32, "patch_size": 8}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": len(WORDS)}
    config = GitConfig(vision_config=vision, max_position_embeddings=80, **tokens, **LAYERS)
    return GitForCausalLM(config), GitProcessor(_clip_images(), tokenizer())


def _llava() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**LAYERS, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **LAYERS, vocab_size=len(WORDS), bos_token_id=2, eos_token_id=3, pad_token_id=0
        ),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    template = (
        "{% for message in messages %}USER : {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        _clip_images(),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return LlavaForConditionalGeneration(config), processor


def _segformer() -> tuple[Any, Any]:
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
    )

    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label={0: "background", 1: "dog;hound", 2: "cat"},
    )
    return (
        SegformerForSemanticSegmentation(config),
        SegformerImageProcessor(size={"height": 64, "width": 64}),
    )


def _detr() -> tuple[Any, Any]:
    from transformers import DetrConfig, DetrForSegmentation, DetrImageProcessor, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    halves = {"layers": 1, "attention_heads": 8, "ffn_dim": 32}
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=128,
        num_queries=4,
        id2label={0: "background", 1: "subject"},
        **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in halves.items()},
    )
    model = DetrForSegmentation(config)
    [last] = [part for part in model.mask_head.modules() if getattr(part, "out_channels", 0) == 1]
    with torch.no_grad():  # a random one is sure of nothing
        model.detr.class_labels_classifier.bias.copy_(torch.tensor([0.0, 20.0, 0.0]))
        last.bias.fill_(20.0)
    return model, DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def _mobilevit() -> tuple[Any, Any]:
    """A model whose processor cuts the middle of an image out."""
    from transformers import (
        MobileViTConfig,
        MobileViTForSemanticSegmentation,
        MobileViTImageProcessor,
    )

    config = MobileViTConfig(
        image_size=64,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8],
        num_attention_heads=2,
        aspp_out_channels=8,
        id2label={0: "background", 1: "dog", 2: "cat"},
    )
    size = {"height": 64, "width": 64}
    processor = MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=size)
    return MobileViTForSemanticSegmentation(config), processor


def _mask2former() -> tuple[Any, Any]:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sides = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim")
    config = Mask2FormerConfig(
        backbone_config=backbone,
        **dict.fromkeys((*sides, "dim_feedforward"), 32),
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        id2label={0: "wall", 1: "dog;hound", 2: "cat"},
    )
    with with_scipy():
        model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # a random one is sure of nothing
        model.class_predictor.bias.copy_(torch.tensor([0.0, 20.0, 0.0, 0.0]))
    return model, Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def _vit() -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTModel

    return (ViTModel(ViTConfig(**LAYERS, image_size=32, patch_size=8)), _clip_images())


BUILDERS = {
    "blip": _blip,
    "git": _git,
    "llava": _llava,
    "segformer": _segformer,
    "detr": _detr,
    "mobilevit": _mobilevit,
    "mask2former": _mask2former,
    "vit": _vit,
}
