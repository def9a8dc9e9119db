"""Run a script on the simulated device, an H100:

    python tests/cuda_sim/script.py SCRIPT ARGUMENT ...
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[:0] = [os.fspath(path) for path in (Path(sys.argv[0]).resolve().parent, *Path(__file__).resolve().parents[:3])]

    import fakecuda  # before torch
    import common.decoding  # noqa: F401  FakeCuda replaces a function in it

    with fakecuda.FakeCuda():
        runpy.run_path(sys.argv[0], run_name="__main__")
