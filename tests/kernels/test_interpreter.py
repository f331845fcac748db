"""The kernel tests once more under Triton's interpreter, which must be chosen before Triton is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run in the tests themselves")
def test_kernels_under_the_interpreter():
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_query_attention.py", "test_absorbed_attention.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90
