"""Has Triton interpret its kernels where there is no GPU; to be imported before Triton is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
