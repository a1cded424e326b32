"""The Stable Diffusion families: everything that differs between them.

Other modules never compare the name of a family or check the kind of a model: they use properties
and methods of the family, such as `Family.time_ids`. A new family is one more entry of
``families.json``, with a new field for each new kind of difference. Modules and tensors are only
passed through: torch is not imported.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal

from dora_diffusion.config.file import read_facts
from dora_diffusion.config.pipeline_index import component_classes, index_file

# Folders of denoisers, which predict noise or velocity, with their names in texts.
DENOISERS = {"unet": "UNet", "transformer": "transformer"}
# Prediction types of UNets, and of transformers that are trained on a flow.
PREDICTION_TYPES = ("epsilon", "v_prediction")
FLOW = "flow_prediction"

# Language models whose head is not read, by their classes with it.
WITHOUT_HEAD = {"Qwen3ForCausalLM": "Qwen3Model"}

# Settings of images that act only with classifier-free guidance.
GUIDANCE = ("guidance_scale", "guidance_rescale", "negative_prompt")

HiddenState = Literal["last", "penultimate"]


class UnsupportedModelError(ValueError):
    """The model exists, but belongs to no supported Stable Diffusion family."""


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        component: Folder, such as ``"text_encoder_2"``.
        kohya_prefix: Prefix of its module names in a kohya file.
        checkpoint_prefix: Prefix of its tensor names in a single-file checkpoint.
        is_in_denoiser: A single-file checkpoint has it among the denoiser's tensors.
        is_open_clip: A single-file checkpoint stores it in open_clip's layout (q, k and v in one
            matrix) instead of CLIP's.
        embedding_key: Its key in files of trained tokens.
        class_name: Name of its class, without a projection.
        tokenizer: Folder of its tokenizer.
        tokenizer_class: Name of the tokenizer's class.
    """

    component: str
    kohya_prefix: str
    checkpoint_prefix: str
    is_open_clip: bool = False
    is_in_denoiser: bool = False
    embedding_key: str = "clip_l"
    class_name: str = "CLIPTextModel"
    tokenizer: str = "tokenizer"
    tokenizer_class: str = "CLIPTokenizer"


@dataclass(frozen=True)
class MemoryRow:
    """Peak resident memory of one training process, one image per step.

    Attributes:
        resolution: Side in pixels.
        gradient_checkpointing: Whether gradient checkpointing was on.
        gib: The peak in GiB.
        is_measured: False if derived from the row of the same kind at another resolution.
    """

    resolution: int
    gradient_checkpointing: bool
    gib: float
    is_measured: bool = True


@dataclass(frozen=True)
class GpuMemory:
    """Live bytes of a training step on a GPU, in GiB: bfloat16, one image, default targets, rank.

    Attributes:
        denoiser: Weights of the denoiser.
        denoiser_linear: Weights of its Linear layers.
        text_encoders: Weights of the text encoders.
        text_linear: Weights of the text encoders' Linear layers.
        vae: Weights of the VAE.
        adapter: Parameters, gradients and AdamW states of an adapter on the UNet.
        adapter_8bit: ``adapter`` with 8-bit AdamW, and what a step takes more for it.
        activations: Everything else at the peak, at ``resolution``.
        recomputed: ``activations`` with gradient checkpointing.
        text_adapter: Addition to ``adapter`` and ``activations`` by adapters on the text encoders.
        resolution: Side in pixels.
        vae_is_float32: The VAE stays in float32 if the model is in half precision.
    """

    denoiser: float
    denoiser_linear: float
    text_encoders: float
    text_linear: float
    vae: float
    adapter: float
    adapter_8bit: float
    activations: float
    recomputed: float
    text_adapter: float
    resolution: int
    vae_is_float32: bool = False


@dataclass(frozen=True)
class Family:
    """Properties of one model family.

    Attributes:
        name: Name in adapter files.
        title: Name in texts.
        pipeline_class: Name of the diffusers pipeline.
        text_encoders: Text encoders, in the order in which their states are concatenated.
        hidden_state: Hidden state that conditions the UNet: ``"last"`` (after the final layer
            norm) or ``"penultimate"`` (before it, without a norm).
        has_pooled: The last text encoder's projected pooled output conditions the UNet too.
        has_time_ids: Original size, crop and target size condition the UNet.
        code: Module of `models.families` with the behaviour of the family.
        denoiser: Folder of the module that predicts noise or velocity: one of `DENOISERS`.
        denoiser_class: Name of its class.
        vae_class: Name of the autoencoder's class.
        prediction_type: Prediction type of a model that states none.
        patch: Side of the denoiser's patches, in latents.
        packs_patches: The denoiser's inputs have the channels of a patch, at a patch's resolution.
        takes_negative_text: The pipeline takes negative prompts as text.
        modules: Regular expression for paths of its layers; empty for UNets.
        most_tokens: Number of tokens of a prompt that are read; None: chunks of CLIP's length.
        guidance_offset: Difference of guidance scales to those of the family's pipeline. 1 for
            pipelines that add the scaled difference to the conditional prediction.
        width: Name and value of the denoiser's width in the configuration of released models.
        width_tensor: Name of a tensor of the denoiser, and its number of rows in released models.
        denoiser_key: Tensor that identifies the denoiser in a single file; empty if the text
            encoder identifies the family.
        denoiser_prefix: Prefix of its tensor names in a file of its own.
        vae_prefix: Prefix of the autoencoder's tensor names in a single-file checkpoint.
        has_separate_files: Programs load denoiser, text encoders and autoencoder from a file each.
        refused: Settings, or values of settings (``"name=value"``), that would give wrong results,
            with the reason (`config.exclusions`).
        without_effect: Settings without effect, with the reason.
        prompt_width: Width of the encoder hidden states in the UNet's cross-attention.
        up_attention: For each up level of the UNet, whether it has attention.
        uses_linear_projection: The UNet's ``use_linear_projection``.
        vae_wants_float32: The released autoencoder overflows in float16.
        auto_pipeline: Name of the diffusers class that finds the pipeline of a model.
        image_arguments: Image arguments of the pipeline, besides the prompt.
        mask_channels: Mask channels after red, green and blue, which the UNet reads at the
            resolution of the latents.
        conditioning_latents: Number of images whose latents the UNet reads with the noisy latents.
        default_resolution: Training resolution of the released models, in pixels.
        default_steps: Default number of optimizer steps.
        default_rate: Default learning rate of adapters.
        defaults: Further settings of runs whose defaults are others for the family.
        distilled: Those of models that were distilled to few denoising steps.
        distilled_names: Regular expressions for the beginning of names, with whether such models
            were distilled.
        distilled_option: Option of the index that is true for them; their pipeline then computes
            no guidance.
        distilled_shift: Shift of their scheduler, which differs from the others'; 0: there is none.
        is_distilled: The model was distilled to few steps (`of_model`).
        released_id: Hub id of the released model.
        released_license: The hub's name of its license.
        is_non_commercial: The license forbids commercial use of the weights.
        configuration: Name of the released models' configuration, for single files.
        has_two_predictions: One release predicts v and another the noise, so a single file must
            state its prediction type. False: a file without one predicts the noise.
        is_suggested: The app offers to download the released model.
        kohya_base_version: ``ss_base_model_version`` of a model that predicts the noise.
        is_kohya_v2: Value of ``ss_v2``.
        kohya_names_original_blocks: kohya files name UNet modules after the original (sgm) blocks.
        architecture: Value of ``modelspec.architecture``.
        v_architecture: ``modelspec.architecture`` of a model that predicts v; ``""``: the same.
        version_mark: Text within ``ss_base_model_version`` of files from any program.
        architecture_mark: Text within ``modelspec.architecture`` of files from any program.
        marks_v_prediction: A single file that predicts v is marked by empty tensors.
        memory: Measured memory of training on a CPU.
        gpu_memory: Computed memory of training on a GPU.
        more_memory_gib: Additional memory, if ``memory`` is that of a smaller family.
    """

    name: str
    title: str
    pipeline_class: str
    text_encoders: tuple[TextEncoder, ...]
    hidden_state: HiddenState
    prompt_width: int
    up_attention: tuple[bool, ...]
    default_resolution: int
    default_steps: int
    released_id: str
    released_license: str
    configuration: str
    kohya_base_version: str
    architecture: str
    version_mark: str
    architecture_mark: str
    memory: tuple[MemoryRow, ...]
    gpu_memory: GpuMemory
    has_pooled: bool = False
    has_time_ids: bool = False
    code: str = "stable_diffusion"
    denoiser: str = "unet"
    denoiser_class: str = "UNet2DConditionModel"
    vae_class: str = "AutoencoderKL"
    prediction_type: str = "epsilon"
    patch: int = 1
    packs_patches: bool = False
    takes_negative_text: bool = True
    modules: str = ""
    most_tokens: int | None = None
    guidance_offset: float = 0.0
    width: tuple[str, int] = ("block_out_channels", 320)
    width_tensor: tuple[str, int] = ("conv_in.weight", 320)
    denoiser_key: str = ""
    denoiser_prefix: str = ""
    vae_prefix: str = "first_stage_model."
    has_separate_files: bool = False
    default_rate: float = 8e-5
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    distilled: Mapping[str, Any] = field(default_factory=dict, hash=False)
    distilled_names: Mapping[str, bool] = field(default_factory=dict, hash=False)
    distilled_option: str = ""
    distilled_shift: float = 0.0
    is_distilled: bool = False
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)
    without_effect: Mapping[str, str] = field(default_factory=dict, hash=False)
    uses_linear_projection: bool = False
    vae_wants_float32: bool = False
    auto_pipeline: str = "AutoPipelineForText2Image"
    image_arguments: tuple[str, ...] = ()
    mask_channels: int = 0
    conditioning_latents: int = 0
    has_two_predictions: bool = False
    is_suggested: bool = True
    is_non_commercial: bool = False
    is_kohya_v2: bool = False
    kohya_names_original_blocks: bool = False
    v_architecture: str = ""
    marks_v_prediction: bool = False
    more_memory_gib: float = 0.0

    @property
    def has_unet(self) -> bool:
        """True if the denoiser is a UNet."""
        return self.denoiser == "unet"

    @property
    def is_modular(self) -> bool:
        """True if Diffusers has a modular pipeline of the model, and no other."""
        return self.auto_pipeline == "ModularPipeline"

    @property
    def licensed_title(self) -> str:
        """Title where a model is chosen."""
        return f"{self.title} (non-commercial weights)" if self.is_non_commercial else self.title

    @property
    def is_flow(self) -> bool:
        """True if the model is trained on a flow."""
        return self.prediction_type == FLOW

    @property
    def has_small_text_encoders(self) -> bool:
        """True if the text encoders have less than half the size of the denoiser."""
        return 2 * self.gpu_memory.text_encoders < self.gpu_memory.denoiser

    def fits(self, kinds: Mapping[str, str], config: Mapping[str, Any]) -> bool:
        """Return whether a pipeline belongs to the family.

        Args:
            kinds: Class names of its components.
            config: Configuration of its denoiser.
        """
        # The SDXL refiner has only the second encoder, and other size conditioning.
        encoders = {n: WITHOUT_HEAD.get(kinds[n], kinds[n]) for n in TEXT_ENCODERS if kinds.get(n)}
        own = dict(zip(self.text_encoder_names, self.text_encoder_classes, strict=True))
        classes = (kinds.get(self.denoiser), kinds.get("vae"), encoders)
        has_time_ids = config.get("addition_embed_type") == "text_time"
        return (*classes, has_time_ids) == (
            self.denoiser_class, self.vae_class, own, self.has_time_ids,
        )  # fmt: skip

    def of_model(
        self,
        name: str,
        index: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        is_distilled: bool | None = None,
    ) -> Family:
        """Return the family of a model, with the defaults of distilled models if it is one.

        Args:
            name: Path or hub id of the model.
            index: Content of its index, which has the hub id that it came from.
            scheduler: Configuration of its scheduler.
            is_distilled: Whether it was distilled; None: as the others say.
        """
        if is_distilled is None:
            is_distilled = self._is_distilled(name, index, scheduler)
        if not is_distilled:
            return self
        without_effect = dict(self.without_effect)
        if self.distilled_option:  # Its pipeline ignores guidance.
            reason = "the model was distilled to work without guidance"
            without_effect |= dict.fromkeys(GUIDANCE, reason)
        return replace(
            self, is_distilled=True, defaults={**self.defaults, **self.distilled},
            without_effect=without_effect,
        )  # fmt: skip

    def _is_distilled(
        self, name: str, index: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> bool:
        if self.distilled_option in index:
            return index[self.distilled_option] is True
        for path in (name, str(index.get("_name_or_path", ""))):
            for pattern, is_distilled in self.distilled_names.items():
                if re.match(pattern, PurePath(path).name, re.IGNORECASE):
                    return is_distilled
        return bool(self.distilled_shift) and scheduler.get("shift") == self.distilled_shift

    def has_released_width(self, config: Mapping[str, Any]) -> bool:
        """Return whether a denoiser has the width of released models, by its configuration."""
        name, width = self.width
        own = config.get(name, width)
        return bool((own[0] if isinstance(own, list) else own) == width)

    def inactive(self, settings: Collection[str]) -> dict[str, str]:
        """Return messages on settings without effect, by setting."""
        return {
            name: f"{name} has no effect on {self.title}: {reason}"
            for name, reason in self.without_effect.items()
            if name in settings
        }

    def pipeline_guidance(self, guidance_scale: float) -> float:
        """Return the pipeline's value for a guidance scale, of which 1 is none."""
        return max(0.0, guidance_scale - self.guidance_offset)

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """Component names of the text encoders, in order."""
        return tuple(encoder.component for encoder in self.text_encoders)

    @property
    def text_encoder_classes(self) -> tuple[str, ...]:
        """Names of the text encoders' transformers classes; the pooled one has a projection."""
        classes = [encoder.class_name for encoder in self.text_encoders]
        return (*classes[:-1], classes[-1] + ("WithProjection" if self.has_pooled else ""))

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """Component names of the tokenizers, in order."""
        return tuple(encoder.tokenizer for encoder in self.text_encoders)

    @property
    def tokenizer_classes(self) -> dict[str, str]:
        """Class names of the tokenizers, by component."""
        return {encoder.tokenizer: encoder.tokenizer_class for encoder in self.text_encoders}

    @property
    def denoiser_components(self) -> tuple[str, ...]:
        """Components in a file of the denoiser alone."""
        inside = (e.component for e in self.text_encoders if e.is_in_denoiser)
        return (self.denoiser, *inside)

    @property
    def checkpoint_key(self) -> str:
        """Name of a tensor that is only in this family's single files, without `UNET_PREFIX`."""
        if self.denoiser_key:
            return self.denoiser_key
        encoder = self.text_encoders[-1]
        norm = "ln_final" if encoder.is_open_clip else "text_model.final_layer_norm"
        return f"{encoder.checkpoint_prefix}{norm}.weight"

    def text_encoder(self, component: str) -> TextEncoder | None:
        """Return the text encoder with this component name; None if there is none."""
        return next((e for e in self.text_encoders if e.component == component), None)

    @property
    def skipped_layers(self) -> int:
        """Number of last text-encoder layers that are skipped even without clip skip."""
        return 1 if self.hidden_state == "penultimate" else 0

    def web_ui_clip_skip(self, clip_skip: int) -> int:
        """Return the ``clip_skip`` of web UIs and sd-scripts, which count the last layer as 1."""
        return clip_skip + self.skipped_layers + 1

    def zeros_for_empty_prompt(self, index: Mapping[str, Any]) -> bool:
        """Return whether an empty negative prompt is encoded as zeros, by the pipeline's config."""
        return self.has_pooled and bool(index.get("force_zeros_for_empty_prompt", True))

    def pipeline_options(self, zeros_for_empty_prompt: bool) -> dict[str, Any]:
        """Return the pipeline's other arguments: no safety checker and no watermark."""
        if not self.has_unet:
            option = self.distilled_option
            return {option: self.is_distilled} if option else {}
        if self.has_pooled:
            zeros = {"force_zeros_for_empty_prompt": zeros_for_empty_prompt}
            return {**zeros, "add_watermarker": False}
        none = {"safety_checker": None, "feature_extractor": None}
        return {**none, "requires_safety_checker": False}

    def vae_overflows(self, config: Mapping[str, Any]) -> bool:
        """Return whether an autoencoder overflows in float16; ``force_upcast`` marks fixed ones."""
        return self.vae_wants_float32 and bool(config.get("force_upcast", True))

    def time_ids(self, crop: Any) -> tuple[int, ...]:
        """Return the UNet's size conditioning of a crop: SDXL's six numbers, else empty.

        Three pairs of (height, width) or (top, left) in pixels (arXiv:2307.01952, section 2.2): the
        photo's original size, the crop's corner in the resized photo, and the target size.
        """
        if not self.has_time_ids:
            return ()
        return (*crop.original_size, *crop.crop_top_left, *crop.target_size)

    def in_channels(self, latent_channels: int = 4) -> int:
        """Number of input channels of the denoiser."""
        channels = latent_channels * (self.patch**2 if self.packs_patches else 1)
        return channels * (1 + self.conditioning_latents) + self.mask_channels

    def images(self, pixels: Any) -> tuple[Any, ...]:
        """Return the autoencoder's inputs from pixels ``(B, 3 + mask_channels, H, W)``.

        The first is the training image, the others condition the UNet: an inpainting model reads
        the image with the masked area (mask 1) blanked out.
        """
        image = pixels[:, :3]
        return (image, image * (pixels[:, 3:] < 0.5)) if self.conditioning_latents else (image,)


def _read() -> dict[str, Family]:
    """Read ``families.json``; an entry with ``like`` inherits the other values of that entry.

    Rows of CPU memory come from ``benchmarks/memory.py --resident``: bfloat16, random weights in
    the released shapes, default targets and rank, UNet and text encoders adapted, AdamW, peak of
    the process. In derived rows, the memory above 7.4 GiB (SDXL's weights, adapter, optimizer,
    process) scales with the number of pixels; the two measured lines of Stable Diffusion 1.5 meet
    in such a sum, 2.5 GiB. Figures of GPU memory come from ``benchmarks/memory.py --parts``; the
    addition by adapters on text encoders is derived from their shapes. Stable Diffusion 2 is
    version 1 with a larger text encoder. Its Diffusers release already drops the last layer (23
    of 24), so its "last" state is the penultimate one of the original model. Kohya's metadata has
    no version for inpainting models.
    """
    facts = read_facts("config/families")
    families = {}
    for name, entry in facts.items():
        values = {**facts.get(entry.pop("like", ""), {}), **entry}
        objects: dict[str, Any] = {
            "text_encoders": tuple(TextEncoder(**encoder) for encoder in values["text_encoders"]),
            "memory": tuple(MemoryRow(**row) for row in values["memory"]),
            "gpu_memory": GpuMemory(**values["gpu_memory"]),
        }
        attributes: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        families[name] = Family(name=name, **attributes | objects)
    return families


FAMILIES: Mapping[str, Family] = _read()
# Family that is assumed for a model that is not available yet.
DEFAULT_FAMILY = next(iter(FAMILIES.values()))
TITLES = ", ".join(family.title for family in FAMILIES.values())

# Folders of text encoders; all folders that can have adapters; all with weights.
TEXT_ENCODERS = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in family.text_encoder_names)
)
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)
WEIGHT_COMPONENTS = (*DENOISERS, "vae", *TEXT_ENCODERS)


def detect_family(
    model_index: Mapping[str, Any], config: Mapping[str, Any], name: str = "the model"
) -> Family:
    """Detect the family from a pipeline's index and its denoiser's ``config.json``.

    The classes of the components decide, never the name of the model.

    Raises:
        UnsupportedModelError: If the model is of another kind; the message names its class.
    """
    kinds = component_classes(model_index)
    fitting = [family for family in FAMILIES.values() if family.fits(kinds, config)]
    if not fitting:
        kind = model_index.get("_class_name", "a pipeline without a class name")
        raise UnsupportedModelError(
            f"{name} is a {kind} of a kind that is not supported; use a base model of {TITLES}"
        )
    if len(fitting) == 1:
        return fitting[0]
    if not fitting[0].has_unet:
        width = config.get("num_attention_heads", 1) * config.get("attention_head_dim", 1)
        return choose_by_states(fitting, config.get("joint_attention_dim", 0), width)
    is_linear = bool(config.get("use_linear_projection"))
    fitting = [f for f in fitting if f.uses_linear_projection == is_linear] or fitting
    return choose_by_channels(fitting, config.get("in_channels", 4))


def choose_by_states(families: Sequence[Family], states: int, width: int) -> Family:
    """Choose the transformer with the nearest width of text states, as a share of its own.

    Args:
        families: Families whose transformers differ in size.
        states: Width of the text states.
        width: Width of the transformer.
    """
    share = states / max(width, 1)
    return min(families, key=lambda f: abs(f.prompt_width / f.width_tensor[1] - share))


def choose_by_channels(families: Sequence[Family], in_channels: int) -> Family:
    """Choose the family whose UNet has this number of input channels.

    Falls back to the first family: the latents of its autoencoder may have other channels.
    """
    return next((f for f in families if f.in_channels() == in_channels), families[0])


def detect_folder_family(folder: Path) -> Family:
    """Detect the family of a diffusers pipeline folder.

    Raises:
        UnsupportedModelError: If it is another kind of model, or a configuration file is damaged.
        OSError: If a configuration file is missing.
    """
    contents = list[Any]()
    configs = (folder / name / "config.json" for name in DENOISERS)
    for file in (index_file(folder), *(file for file in configs if file.is_file())):
        try:
            contents.append(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise UnsupportedModelError(f"{file} is damaged; download the model again") from error
    index, config = [*contents, {}][:2]
    return detect_family(index, config, str(folder))


def transformer_family(path: str) -> str:
    """Return the name of the family whose transformer has a layer of this path; ``""`` if none.

    The path is that of Diffusers or the original one, with dots or underscores.
    """
    return next((name for name, pattern in _modules().items() if pattern.match(path)), "")


@cache
def _modules() -> Mapping[str, re.Pattern[str]]:
    patterns = {n: f.modules.replace(r"\.", "[._]") for n, f in FAMILIES.items() if f.modules}
    return {name: re.compile(pattern) for name, pattern in patterns.items()}


def denoiser_family(names: Iterable[str]) -> str:
    """Return the name of the family with most of these layers of transformers; ``""`` if none.

    Args:
        names: Paths of layers, with or without the prefix of their component.
    """
    prefix = re.compile(
        r"(base_model\.model\.)?((diffusion_model|transformer|net)\.)?(lora_unet_|lycoris_)?"
    )
    paths = (name[match.end() if (match := prefix.match(name)) else 0 :] for name in names)
    votes = Counter(filter(None, map(transformer_family, paths)))
    return votes.most_common(1)[0][0] if votes else ""


def guess_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Guess the name of the family from the shapes of adapted weights; ``""`` if it is unclear.

    A second text encoder decides, otherwise the width of the encoder hidden states. Sizes of one
    transformer are told apart by the width of its attention.
    """
    if family := denoiser_family(name for name in shapes if name.startswith("transformer.")):
        alike = [f for f in FAMILIES.values() if f.code == FAMILIES[family].code]
        inputs = (s[1] for n, s in shapes.items() if re.search(r"\.to_q(kv_mlp_proj)?$", n))
        width = max(inputs, default=0)
        return min(alike, key=lambda f: abs(f.width_tensor[1] - width)).name
    if any(name.startswith("text_encoder_2.") for name in shapes):
        return next(name for name, f in FAMILIES.items() if len(f.text_encoders) == 2)
    widths = {
        shape[1] for name, shape in shapes.items() if name.endswith(("attn2.to_k", "attn2.to_v"))
    }
    names = [name for name, f in FAMILIES.items() if f.has_unet and {f.prompt_width} == widths]
    return names[0] if names else ""
