"""Memory that is kept is not asked of the system again."""

from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource
import numpy as np
from router.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
np.ones(40 << 20, np.int8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(40 << 20, np.int8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept: bool) -> int:
    """How often the system makes pages for ten arrays, one after the other, as large as before."""
    code = FAULTS.format(kept=kept)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def test_the_memory_of_large_arrays_serves_the_next_ones() -> None:
    assert faults(kept=True) < faults(kept=False) / 5
