"""Gradients: the same bits under every checkpointing, and those of float64 through the chunked loss, attention and norms that training uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy as torch_cross_entropy

from tradespace.adapt.recompute import recompute
from tradespace.build_training import build_model
from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.quantize.rtn import fill_rtn
from tradespace.spec.training import parse_checkpointing, qlora_weights
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import IGNORED
from tradespace.train.loss import chunked_loss, cross_entropy
from train.small import V, small_data, small_model, small_spec


def _gradients(model, micro, chunk=1000):
    model.zero_grad()
    hidden_TD = model(micro.tokens_T, micro.positions_T, micro.batch)
    loss = chunked_loss(model, hidden_TD, cross_entropy(micro.targets_T), scale=1 / micro.num_targets, chunk=chunk)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_checkpointing_changes_no_bit(fmt):
    model = small_model(small_spec(L=5), fmt)
    for parameter in model.parameters():
        parameter.requires_grad_()
    micro = small_data().micro_batch([0, 5, 3])
    loss, want = _gradients(model, micro)
    for policy in ("norms", "selective", "full", "every-2", "offload", "full:2,selective:1,none:1,offload:1"):
        recompute(model, parse_checkpointing(policy, 5))
        again, found = _gradients(model, micro)
        assert torch.equal(loss, again), policy
        assert all(torch.equal(want[name], found[name]) for name in want), policy


def test_policies_that_make_no_sense():
    model = small_model(small_spec(L=3))
    with pytest.raises(InputError, match="covers 2 layers; the model has 3"):
        parse_checkpointing("full:2", 3)
    with pytest.raises(InputError, match="write none, norms, selective"):
        parse_checkpointing("some", 3)
    with pytest.raises(InputError, match="segments of 2 layers"):
        recompute(model, parse_checkpointing("full", 2))
    spec = small_spec(L=1)
    parallel = replace(spec, layers=(replace(spec.layers[0], arrangement="parallel"),))
    with pytest.raises(UnsupportedError, match="in one piece"):
        recompute(small_model(parallel), parse_checkpointing("selective", 1))


class _Head(nn.Module):
    """What `chunked_loss` asks of a model."""

    def __init__(self, model, softcap, scale):
        super().__init__()
        self.final_norm, self.embed, self.lm_head = None, model.embed, None
        self.spec = replace(model.spec, logit_softcap=softcap, logit_scale=scale)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_chunked_loss_is_that_of_float64(softcap, scale, chunk):
    torch.manual_seed(1)
    model = _Head(small_model(small_spec()), softcap, scale)
    model.embed.weight.data.normal_(std=0.5)
    model.embed.weight.requires_grad_()
    x_TD = torch.randn(64, 64, requires_grad=True)
    targets_T = torch.randint(0, V, (64,))
    targets_T[::5] = IGNORED
    (3 * chunked_loss(model, x_TD, cross_entropy(targets_T), scale=0.25, chunk=chunk)).backward()
    wide_TD, wide_VD = x_TD.detach().double().requires_grad_(), model.embed.weight.detach().double().requires_grad_()
    logits = scale * (wide_TD @ wide_VD.T)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    (3 * 0.25 * torch_cross_entropy(logits, targets_T, ignore_index=IGNORED, reduction="sum")).backward()
    for ours, theirs in ((x_TD.grad, wide_TD.grad), (model.embed.weight.grad, wide_VD.grad)):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("fmt", ["int8", "nf4", "int4"])
def test_a_head_in_codes_gives_the_loss_and_gradient_of_what_it_stands_for(fmt):
    """Embedding and head of a QLoRA base, in codes; beside the same numbers as floats."""
    spec = small_spec(L=1, tied=False)
    model = build_model(spec, qlora_weights("nf4", fmt), context=64)
    dense = build_model(spec, WeightPlan(default="bf16"), context=64)
    torch.manual_seed(2)
    for name in ("embed", "lm_head"):
        coded, plain = model.get_submodule(name), dense.get_submodule(name)
        fill_rtn(coded, 0, torch.randn(V, 64) * 0.3, name=name)  # type: ignore[arg-type]
        plain.weight.data.copy_(coded.dense_rows(0, V))  # type: ignore[union-attr]
    for held in (model, dense):
        held.get_parameter("final_norm.weight").data.fill_(1.0)
    ids_T, targets_T = torch.randint(0, V, (50,)), torch.randint(0, V, (50,))
    torch.testing.assert_close(model.embed.rows(ids_T), dense.embed.rows(ids_T))
    found = []
    for held in (model, dense):
        x_TD = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
        loss = chunked_loss(held, x_TD, cross_entropy(targets_T), scale=0.02, chunk=16)
        loss.backward()
        assert x_TD.grad is not None
        found.append((float(loss.detach()), x_TD.grad.float()))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-3)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-2


def test_training_attention_and_norms_are_those_of_float64():
    """Whole model, three documents of different lengths: every gradient against the reference kernels in float64 arithmetic of the same weights."""
    spec = small_spec(L=2)
    fast, slow = small_model(spec), small_model(spec, attention="reference", linear="reference")
    micro = small_data(context=31).micro_batch([0, 7])
    assert len(micro.batch.spans) > 1
    for model in (fast, slow):
        for parameter in model.parameters():
            parameter.requires_grad_()
            torch.manual_seed(parameter.numel())
            parameter.data += 0.1 * torch.randn(parameter.shape)
    _, ours = _gradients(fast, micro)
    _, theirs = _gradients(slow, micro)
    for name in ours:
        assert (ours[name] - theirs[name]).norm() / theirs[name].norm() < 2e-5, name


def test_a_document_does_not_see_another():
    """Alone or beside another document: the same loss, up to rounding."""
    model = small_model(small_spec())
    ids = [torch.randint(0, V, (length,)) for length in (20, 13)]

    def hidden(parts):
        batch = StepBatch.packed([len(part) for part in parts])
        for parameter in model.parameters():
            parameter.requires_grad_()
        return model(torch.cat(parts), positions_of(batch.spans), batch)

    torch.testing.assert_close(hidden(ids)[20:], hidden(ids[1:]), atol=1e-6, rtol=1e-5)
