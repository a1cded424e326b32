"""Configuration of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dora_diffusion.config.fields import REQUIRED, Setting, python_number, require

PRESETS = (
    "cross-attention", "attention", "attention+conv", "attention+ff", "full", "b-lora-content",
    "b-lora-style",
)  # fmt: skip
TEXT_ENCODER_PRESETS = ("text-encoder-attention", "text-encoder", "token-embedding")
NORM_AXES = ("output", "input")
INITS = ("random", "pissa")
PARAMETRIZATIONS = ("low-rank", "vera", "adalora")
PATTERNS = ("rank_pattern", "alpha_pattern")
"""Settings that map targets to values for the layers that they match."""
# With `REQUIRED`, None is refused.
_CHECKED = (
    Setting("targets", str, is_list=True, default=REQUIRED),
    Setting("rank", int, default=REQUIRED, above=0),
    Setting("alpha", float, above=0),
    Setting("conv_rank", int, above=0),
    Setting("conv_alpha", float, above=0),
    Setting("rslora", bool, default=REQUIRED),
    Setting("use_dora", bool, default=REQUIRED),
    Setting("norm_axis", str, default=REQUIRED, choices=NORM_AXES),
    Setting("dropout", float, default=REQUIRED, least=0, below=1),
    Setting("init", str, default=REQUIRED, choices=INITS),
    Setting("parametrization", str, default=REQUIRED, choices=PARAMETRIZATIONS),
    Setting("projection_seed", int, default=REQUIRED),
    Setting("rank_pattern", int, is_list=True, is_map=True, default=REQUIRED, above=0),
    Setting("alpha_pattern", float, is_list=True, is_map=True, default=REQUIRED, above=0),
)


@dataclass(frozen=True)
class AdapterConfig:
    """Configuration of an adapter.

    Attributes:
        targets: Preset names (`PRESETS`, `TEXT_ENCODER_PRESETS`) or glob patterns of module paths.
        rank: r of Linear layers.
        alpha: The scale is ``alpha / rank``. None means ``alpha = rank``.
        conv_rank: r of Conv2d layers. None means ``rank``.
        conv_alpha: None means ``conv_alpha = conv_rank``.
        rslora: Scale by ``alpha / sqrt(rank)`` instead (arXiv:2312.03732).
        use_dora: Train a magnitude. False gives plain LoRA.
        norm_axis: ``"output"`` (one magnitude per output channel, as in PEFT) or ``"input"``
            (one per input channel, as printed in the paper).
        dropout: Probability of dropping an input of the low-rank path.
        init: Initialization of A and B. ``"random"``: A random, B zero. ``"pissa"``: both from the
            leading singular vectors of the weight (arXiv:2404.02948); the update has rank 2r.
        parametrization: Form of the update. ``"low-rank"``: trainable A and B. ``"vera"``: frozen
            random A and B of ``rank``, shared by all layers, and trainable vectors
            (arXiv:2310.11454); the scale is 1. ``"adalora"``: A with a factor for each row, by
            which ``train`` switches rows off (arXiv:2303.10512).
        projection_seed: Seed of VeRA's A and B.
        rank_pattern: r of layers by target; the first target that matches a layer applies. A
            layer's name may also end with the target after a dot, as in PEFT: ``"to_k"``,
            ``"ff.net.*"``.
        alpha_pattern: Alpha of layers by target, in the same way. A layer that no target matches
            keeps its alpha, even if ``rank_pattern`` changes its rank (as in PEFT).

    Example:
        >>> AdapterConfig(rank=8).conv_rank_or_rank
        8

    Raises:
        ConfigError: If a value cannot work.
    """

    targets: tuple[str, ...] = ("attention+conv",)
    rank: int = 8
    alpha: float | None = None
    conv_rank: int | None = None
    conv_alpha: float | None = None
    rslora: bool = False
    use_dora: bool = True
    norm_axis: str = "output"
    dropout: float = 0.0
    init: str = "random"
    parametrization: str = "low-rank"
    projection_seed: int = 0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        require(
            bool(self.targets),
            "targets is empty; name a preset or a pattern of module paths",
            "targets",
        )
        for setting in _CHECKED:
            object.__setattr__(self, setting.name, python_number(getattr(self, setting.name)))
            setting.check(getattr(self, setting.name))
        require(
            self.init == "random" or self.parametrization == "low-rank",
            f"init {self.init} sets A and B of parametrization low-rank, but parametrization is "
            f"{self.parametrization}; leave one of them out",
            "init",
        )
        require(
            0 <= self.projection_seed < 2**63,
            f"projection_seed is {self.projection_seed}; it must be in [0, 2^63)",
            "projection_seed",
        )
        if self.parametrization == "vera":
            self._check_vera()

    def _check_vera(self) -> None:
        for name in PATTERNS:
            require(
                not getattr(self, name),
                f"{name} is set, but all layers of parametrization vera share projections of one "
                f"rank, with the scale 1; leave {name} out",
                name,
            )
        require(
            self.conv_rank_or_rank == self.rank,
            f"conv_rank is {self.conv_rank}: all layers of parametrization vera share "
            f"projections of rank {self.rank}; leave conv_rank out",
            "conv_rank",
        )

    def check_start(self) -> None:
        """Refuse ``init_adapter`` unless the adapter trains A and B from a random start.

        Raises:
            ConfigError: If another setting initializes A and B, or other parameters are trained.
        """
        for name, default in (("init", "random"), ("parametrization", "low-rank")):
            value = getattr(self, name)
            require(
                value == default,
                f"init_adapter sets A and B, but {name} {value} starts from other values; leave "
                "one of them out",
                "init_adapter",
            )

    def keeps_scale(self, is_conv: bool, alpha: float | None = None) -> bool:
        """Return whether a layer keeps the scale of the adapter that it starts from.

        It does unless an alpha or ``rslora`` is given.

        Args:
            is_conv: As in `rank_and_alpha`.
            alpha: The layer's alpha in ``alpha_pattern``.
        """
        configured_alpha = self.conv_alpha if is_conv else self.alpha
        return configured_alpha is None and alpha is None and not self.rslora

    @property
    def description(self) -> tuple[str, str]:
        """Name of the method and its ranks, for texts."""
        if self.parametrization == "vera":
            return "DVoRA" if self.use_dora else "VeRA", f"projections of rank {self.rank}"
        ranks = f"rank {self.rank}, convolutions {self.conv_rank_or_rank}"
        return "DoRA" if self.use_dora else "LoRA", ranks

    @property
    def conv_rank_or_rank(self) -> int:
        """Rank of Conv2d layers."""
        return self.rank if self.conv_rank is None else self.conv_rank

    def rank_and_alpha(
        self, is_conv: bool, rank: int | None = None, alpha: float | None = None
    ) -> tuple[int, float]:
        """Rank and effective alpha of a layer; its scale is always ``alpha / rank``.

        Args:
            is_conv: Whether the layer has the rank of convolutions.
            rank: The layer's rank in ``rank_pattern``.
            alpha: The layer's alpha in ``alpha_pattern``.
        """
        default_rank = self.conv_rank_or_rank if is_conv else self.rank
        rank = default_rank if rank is None else rank
        if self.parametrization == "vera":
            return rank, float(rank)
        configured_alpha = self.conv_alpha if is_conv else self.alpha
        alpha = next(
            float(value) for value in (alpha, configured_alpha, default_rank) if value is not None
        )
        return rank, alpha * rank**0.5 if self.rslora else alpha
