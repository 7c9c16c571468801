"""Our Muon against torch's, and what it does to a matrix."""

import copy

import pytest
import torch

from tokenformer.training.muon import Muon, orthogonalise

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (40, 8)]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_steps_are_those_of_torch():
    """Up to bfloat16, in which torch multiplies."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = copy.deepcopy(ours)
    optimizers = Muon(ours, lr=0.1, weight_decay=0.1), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02)
        states = (optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (a, b), strict=True))
        torch.testing.assert_close(*states)


@pytest.mark.parametrize("shape", [(3, 20, 12), (2, 12, 20), (1, 16, 16)])
def test_singular_values_become_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.transpose(1, 2) @ orthogonalise(matrices) @ vh.transpose(1, 2)
    values = torch.diagonal(inside, dim1=1, dim2=2)
    assert ((values > 0.6) & (values < 1.3)).all()
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)


def test_each_matrix_is_its_own_whatever_lies_beside_it():
    matrices = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(2))
    matrices[1] *= 1e4
    each = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), each)


def test_a_zero_gradient_moves_nothing():
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1).step()
    assert torch.equal(p, torch.ones(4, 6))


def test_only_matrices():
    with pytest.raises(ValueError, match=r"shape \(3,\); give it to AdamW"):
        Muon([torch.nn.Parameter(torch.ones(3))])
