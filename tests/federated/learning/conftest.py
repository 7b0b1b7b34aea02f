"""One thread for torch: the machine has much else to do, and the models are small."""

from __future__ import annotations

import os

# Read when torch is first imported, which tests that need none of it never do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
