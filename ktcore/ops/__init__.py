"""The public operators, one file each: check the arguments, choose an implementation, run it.

Each is also a ``torch.library`` operator ``torch.ops.ktcore.<name>`` with a fake implementation, so
that ``torch.compile(fullgraph=True)`` and ``torch.export`` see one node.
"""

from ktcore.ops.attention import attention, store_kv
from ktcore.ops.dequantize import dequantize
from ktcore.ops.linear import linear
from ktcore.ops.mla_attention import mla_attention, store_latent
from ktcore.ops.moe import moe
from ktcore.ops.quantize import quantize
from ktcore.ops.rms_norm import add_rms_norm, rms_norm
from ktcore.ops.rotary import rotary
from ktcore.ops.route import route

__all__ = [
    "add_rms_norm",
    "attention",
    "dequantize",
    "linear",
    "mla_attention",
    "moe",
    "quantize",
    "rms_norm",
    "rotary",
    "route",
    "store_kv",
    "store_latent",
]
