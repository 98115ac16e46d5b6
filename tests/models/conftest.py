import importlib.util

import torch

torch.set_num_threads(1)

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_flash*.py"]
"""Triton is made for Linux alone; elsewhere its kernels cannot run."""
