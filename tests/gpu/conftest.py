"""Tests that run on every device: small on the CPU, and in full with ``pytest -m gpu``."""

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device: nothing of this was tested on a GPU"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CUDA)])
def device(request):
    """The CPU, and CUDA under the mark ``gpu``."""
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=ON_CUDA)])
def cuda(request):
    """For what has no meaning elsewhere."""
    return torch.device(request.param)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=ON_CUDA)]
)
def slow_on_cpu(request):
    """Like ``device``, where the CPU takes long and other tests cover much of it."""
    return torch.device(request.param)
