"""Expert shapes of published models, and of the one that ktcore ships."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

# The keys of a config.json that hold an expert layer's four sizes; families name them differently.
QWEN = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
DEEPSEEK = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
MIXTRAL = ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer's routed experts."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: expected at most num_experts, {self.num_experts}, got {self.top_k}"
            )

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Preset:
    """A model's shape and where it is from.

    Attributes:
        repository: the Hugging Face repository whose config.json has the figures.
        keys: where in that file they stand, in the order of `Shape`; "a.b" is b within a.
    """

    name: str
    shape: Shape
    repository: str
    keys: tuple[str, str, str, str]

    @property
    def source(self) -> str:
        return f"config.json of {self.repository} ({', '.join(self.keys)})"


EMBEDDED = "kjv-moe"

PRESETS = (
    Preset("Qwen3-30B-A3B", Shape(2048, 768, 128, 8), "Qwen/Qwen3-30B-A3B", QWEN),
    Preset("DeepSeek-V2-Lite", Shape(2048, 1408, 64, 6), "deepseek-ai/DeepSeek-V2-Lite", DEEPSEEK),
    Preset("DeepSeek-V3", Shape(7168, 2048, 256, 8), "deepseek-ai/DeepSeek-V3", DEEPSEEK),
    Preset("Kimi-K2", Shape(7168, 2048, 384, 8), "moonshotai/Kimi-K2-Instruct", DEEPSEEK),
    Preset("Mixtral-8x7B", Shape(4096, 14336, 8, 2), "mistralai/Mixtral-8x7B-v0.1", MIXTRAL),
    Preset("GLM-4.5-Air", Shape(4096, 1408, 128, 8), "zai-org/GLM-4.5-Air", DEEPSEEK),
    Preset(
        "Llama-4-Scout",
        Shape(5120, 8192, 16, 1),
        "meta-llama/Llama-4-Scout-17B-16E",
        tuple(f"text_config.{key}" for key in MIXTRAL),
    ),
    Preset("gpt-oss-120b", Shape(2880, 2880, 128, 4), "openai/gpt-oss-120b", MIXTRAL),
    # Not on the hub: the model in ktcore/data, whose config.json is meant.
    Preset(EMBEDDED, Shape(192, 64, 16, 4), f"ktcore's embedded model {EMBEDDED}", QWEN),
)


def find_preset(name: str) -> Preset:
    """The preset of a model, by its name in any case.

    Raises:
        ValueError: there is none; the message suggests near names and lists all.
    """
    by_name = {preset.name.lower(): preset for preset in PRESETS}
    found = by_name.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), by_name, n=2, cutoff=0.5)
        guess = " or ".join(by_name[n].name for n in near)
        hint = f" Did you mean {guess}?" if guess else ""
        raise ValueError(
            f"unknown model {name!r}.{hint} There are: {', '.join(p.name for p in PRESETS)}; for "
            "another, give its sizes: --hidden-size, --intermediate-size, --num-experts, --top-k"
        )
    return found
