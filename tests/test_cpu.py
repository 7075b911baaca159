"""`prepare_cpu`, which changes a whole process and is therefore looked at from another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from convlora.cpu import _glibc, kept_memory

# Page faults of 16 pieces of 16 MiB in turn, before and after `prepare_cpu`, and the bytes kept then.
PROGRAM = """
import json, resource
import torch
import convlora
from convlora.cpu import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        torch.empty(1 << 22).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
convlora.prepare_cpu()
faults()
print(json.dumps([*found, faults(), kept_memory(), float(torch.tensor(1e-39) * 1)]))
"""


def run(**environment: str) -> list[float]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    before, after, kept, denormal = run()
    assert before > 100 and after < before / 10  # a page has 4 KiB, or 2 MiB where the system is generous
    assert kept >= 1 << 24
    assert denormal == 0


@pytest.mark.skipif(_glibc() is None, reason="the C library is not glibc")
def test_what_the_environment_says_of_the_allocator_holds():
    before, after, *_ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert after > before / 2


def test_without_glibc_nothing_is_known(monkeypatch):
    monkeypatch.setattr("convlora.cpu._glibc", lambda: None)
    assert kept_memory() == 0
