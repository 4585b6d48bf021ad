"""Weights that take the place of others for a while."""

import pytest
import torch

from align.offload import Weights


def test_lent_weights_compute_and_leave_no_trace():
    torch.manual_seed(0)
    module, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    shared = module.weight.data  # as Megatron's buffers share memory with parameters
    kept, before = Weights(module), module(x).detach()
    with torch.no_grad():
        module.weight.add_(1.0)
    trained = module(x).detach()
    with kept.lent_to(module):
        assert torch.equal(module(x), before)
    assert torch.equal(module(x), trained)
    assert module.weight.data.data_ptr() == shared.data_ptr()
    shared.zero_()  # an optimizer's update of the buffer is one of the parameter
    assert torch.equal(module.weight, torch.zeros(2, 3))
    with kept.lent_to(module):
        assert torch.equal(module(x), before)


def test_an_error_gives_the_weights_back():
    module = torch.nn.Linear(2, 2)
    kept, own = Weights(module), module.weight.data_ptr()
    with pytest.raises(FloatingPointError), kept.lent_to(module):
        raise FloatingPointError
    assert module.weight.data_ptr() == own
