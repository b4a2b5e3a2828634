"""Chooses block sizes: `python -m pallas_kernels.tune OPERATION` fills the tables that the kernels read.

Candidates are timed on the device where it is of the asked family, and compared by the static cycles of their
schedule where it is not (see `pallas_kernels.compiler.static_cycles`).
"""
