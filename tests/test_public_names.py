"""The public names, frozen: taking one away breaks a user, adding one is a decision."""

from __future__ import annotations

import subprocess
import sys

import duomo

NAMES = [
    "LLM",
    "Completion",
    "Error",
    "Message",
    "ModelConfig",
    "SamplingParams",
    "create_app",
    "finetune",
    "load_model",
    "quantize",
]


def test_the_public_names_are_these_and_all_are_there() -> None:
    assert duomo.__all__ == NAMES
    assert all(getattr(duomo, name) is not None for name in NAMES)


def test_importing_duomo_loads_no_torch() -> None:
    program = "import sys, duomo; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
