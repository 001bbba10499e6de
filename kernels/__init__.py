"""Compiled inner loops. Each has a slow, readable twin: bpe.py in tests/test_bpe.py, rational.py and rational_triton.py in
kernels/rational.py itself (`rational_torch`, which devices without a kernel run), compared in tests/test_rational.py, and
cross_entropy_triton.py in layers/loss.py, compared in tests/test_loss.py."""
