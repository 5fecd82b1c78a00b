"""Sequence kernels: attention, scans and recurrences as functions of tensors."""
