"""Weights as stored: quantised tensors, the experts of a layer, and the files they come from."""

from ktcore.weights.experts import ExpertWeights
from ktcore.weights.gguf_file import GgufFile
from ktcore.weights.quant_tensor import QuantTensor
from ktcore.weights.safetensors_file import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "ExpertWeights", "GgufFile", "QuantTensor"]
