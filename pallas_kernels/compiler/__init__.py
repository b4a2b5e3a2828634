"""Compiles kernels ahead of time for devices that are not there, and reads what the compilers say of them.

- `aot`: compiles a function for a TPU or an H200 on any machine.
- `static_cycles`: cycles, slots and spills of TPU kernels, from the schedule that libtpu made.
- `hopper_report`: registers, spills and warnings of Mosaic GPU kernels, from ptxas.

Needs the compilers: `pip install "jax[tpu]"` for TPUs; jax-cuda13-plugin, nvidia-cuda-nvcc, nvidia-nvvm and absl-py for
the H200.
"""
