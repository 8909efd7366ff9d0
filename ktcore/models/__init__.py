"""Language models on `ktcore.ops`: loading, generating, perplexity. One file per model family."""

from ktcore.models.config import DecoderConfig
from ktcore.models.decoder import Decoder
from ktcore.models.family import Family, families
from ktcore.models.generation import Generation, generate
from ktcore.models.kv_cache import KVCache
from ktcore.models.loading import load_model
from ktcore.models.model import Model
from ktcore.models.moe_layer import MoeLayer
from ktcore.models.perplexity import perplexity
from ktcore.models.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Family",
    "Generation",
    "KVCache",
    "Model",
    "MoeLayer",
    "StreamDecoder",
    "Tokenizer",
    "families",
    "generate",
    "load_model",
    "perplexity",
]
