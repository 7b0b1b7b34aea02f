"""One thread for torch, as in the tests of `learning`."""

from __future__ import annotations

import os

# Read when torch is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
