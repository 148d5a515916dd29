"""Killed anywhere, the job ends as if nothing had happened."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


@pytest.mark.slow
def test_fifty_kills_lose_nothing():
    """For more: python tests/faults/kills.py --kills 5000 --seed 3."""
    done = subprocess.run(
        [sys.executable, KILLS, "--kills", "50", "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    kills, resumes, losses = (
        int(number) for number in re.findall(r"(\d+) (?:kills|resumes|losses)", last)
    )
    assert kills >= 50
    assert resumes >= 40
    assert losses == 0
