"""Triton decides at its import whether it interprets, so the kernels' tests run in a child (`test_interpreter`)."""

import os

KERNEL_TESTS = ("test_swap.py", "test_pack.py", "test_fp8.py")
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else list(KERNEL_TESTS)
