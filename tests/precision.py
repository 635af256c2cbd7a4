"The precision around a computation, which must not change it."
from contextlib import contextmanager

import torch

AMBIENT = 'autocast bfloat16', 'autocast float16', 'default bfloat16', 'default float64'


@contextmanager
def precision_around(ambient):
    kind, dtype = ambient.split()
    dtype = getattr(torch, dtype)
    if kind == 'autocast':
        with torch.autocast('cpu', dtype=dtype): yield
        return
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)


def value_and_slope(f, at):
    "Of a function of one tensor."
    at = at.clone().requires_grad_()
    value = f(at)
    return value.detach(), torch.autograd.grad(value, at)[0]
