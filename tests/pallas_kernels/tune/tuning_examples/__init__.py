"""Stands in for `pallas_kernels.kernels` in tests of the tuner."""
