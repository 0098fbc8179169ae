"""Attention over tile lists in Pallas kernels for TPUs and for Hopper GPUs."""
