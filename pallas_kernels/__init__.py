"""Kernels for training language models in JAX: attention, expert routing, grouped matmul, fused cross-entropy.

Arrays in, arrays out; nothing but jax is imported. Each function takes `backend="auto" | "pallas" | "xla"`.
"""
