"""Triton kernels for attention with one query per frame. A leaf: imports torch and triton, nothing of fovlm.

This file stays empty: Hugging Face has a package of the same name and transformers probes for it.
"""
