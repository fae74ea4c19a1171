"""Where these tests run: on a GPU, or, in a rehearsal, on a CPU in its place, so that no line of them is new to a GPU."""

import os

import torch

REHEARSAL = os.environ.get("MILLIJOULE_GPU_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
MISSING = not REHEARSAL and not torch.cuda.is_available()
