"""Conversion between the decoder and stock Hugging Face models: Qwen2, Qwen3, Qwen3-MoE, GLM-4-MoE and Llama."""

from davinci_jax.models.huggingface.config import from_dict, read_config, to_dict
from davinci_jax.models.huggingface.loading import load, load_weights, parameter_path
from davinci_jax.models.huggingface.saving import save

__all__ = ["from_dict", "load", "load_weights", "parameter_path", "read_config", "save", "to_dict"]
