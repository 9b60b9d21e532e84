"""The Transformer beside its mathematics: bits that do not depend on neighbours, gradients, routed experts, dtypes, layers wrapped from outside, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from model.family_configs import V
from model.family_models import FP32, Stepper, make_pair, packed_logits
from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.view import StepBatch, positions_of
from tradespace.model.feed_forward import RoutedFeedForward
from tradespace.model.parts import Parts
from tradespace.model.transformer import Transformer
from tradespace.spec.model import Attention, DenseFFN, LayerSpec, ModelSpec, Rope, RoutedFFN
from tradespace.spec.tensors import model_tensors
from tradespace.spec.weights import WeightPlan, weight_bytes

# odd widths on purpose: vectorized loops end in scalar tails
ODD = ModelSpec(
    name="odd",
    family="llama",
    D=37,
    V=53,
    layers=(LayerSpec(mixer=Attention(N=3, K=1, H=10, rope=Rope(dims=6), qk_norm="head", qkv_bias=True), ffn=DenseFFN(F=21, activation="gelu")),) * 2,
    max_context=64,
    logit_softcap=3.0,
)


def _random(spec: ModelSpec, plan: WeightPlan = FP32, **kernels: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(spec, plan, max_context=spec.max_context, **kernels)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("default", ["fp32", "bf16"])
def test_reference_logits_do_not_depend_on_neighbours(default):
    """Alone in one step, beside others, in chunks, and token by token: equal bits, all the way to the logits."""
    model = _random(ODD, WeightPlan(default=default), attention="reference", linear="reference")
    tokens_T, other_T, third_T = (torch.randint(0, ODD.V, (length,)) for length in (19, 33, 5))
    (alone,) = packed_logits(model, [tokens_T])
    assert torch.equal(packed_logits(model, [other_T, tokens_T, third_T])[1], alone)
    for sizes in ((19,), (7, 12), (1,) * 19, (4, 1, 1, 13)):
        stepper = Stepper(model, 3, "paged")
        found = []
        for number, size in enumerate(sizes):
            chunks = {0: tokens_T[stepper.lengths[0] :][:size]}
            if number < 5:  # neighbours come and go, before and after it in the step
                chunks = {2: third_T[number : number + 1], **chunks, 1: other_T[stepper.lengths[1] :][: number + 2]}
            found.append(stepper.step(chunks)[0])
        assert torch.equal(torch.cat(found), alone), f"chunks of {sizes}"


@pytest.mark.parametrize(("attention", "linear"), [("sdpa", "torch"), ("reference", "reference")])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "gpt2", "phi3"])
def test_gradients_are_transformers(family, attention, linear, tmp_path):
    """Without a cache gradients flow: embedding, final norm and first layer's attention norm, two documents packed in one step."""
    pair = make_pair(family, 1, tmp_path)
    model = pair.ours(max_context=32, attention=attention, linear=linear)
    for parameter in model.parameters():
        parameter.requires_grad_()
    # token 0 is some families' padding, whose embedding transformers keeps from learning
    documents = [torch.randint(1, V, (length,)) for length in (11, 6)]
    batch = StepBatch.packed([len(tokens_T) for tokens_T in documents])
    logits = model.logits(model(torch.cat(documents), positions_of(batch.spans), batch))
    (logits.log_softmax(-1)[:, 3].sum()).backward()
    sum(pair.oracle(tokens_T[None]).logits[0].log_softmax(-1)[:, 3].sum() for tokens_T in documents).backward()
    theirs = pair.oracle.get_input_embeddings().weight.grad
    if not model.spec.tied:
        assert model.lm_head is not None
        torch.testing.assert_close(model.lm_head.weight.grad, pair.oracle.get_output_embeddings().weight.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.embed.weight.grad, theirs, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_routed_feed_forward_is_mixtrals():
    config = MixtralConfig(hidden_size=20, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2)
    oracle = MixtralSparseMoeBlock(config)
    theirs = dict(oracle.named_parameters())
    ffn = RoutedFFN(E=5, top_k=2, F=12)
    spec = ModelSpec(name="moe", family="mixtral", D=20, V=7, layers=(LayerSpec(mixer=None, ffn=ffn),), max_context=8)
    routed = RoutedFeedForward(Parts(spec, FP32, linear="torch", device="cpu"), "layers.0.ffn", ffn)
    with torch.no_grad():
        for parameter in theirs.values():
            parameter.normal_()
        routed.router.weight.copy_(theirs["gate.weight"])
        getattr(routed.experts, "gate_up").weight.copy_(theirs["experts.gate_up_proj"])  # noqa: B009 (a slot named by the spec)
        routed.experts.down.weight.copy_(theirs["experts.down_proj"])
        x_TD = torch.randn(9, 20)
        expected = oracle(x_TD[None])
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(routed(x_TD), expected.view(9, 20), atol=2e-5, rtol=1e-4)


def test_a_routed_model_runs_whole():
    """The slot is chosen by the type of the layer's feed-forward, and the module holds what the spec lists."""
    routed = LayerSpec(mixer=Attention(N=2, K=1, H=8, rope=Rope(dims=8)), ffn=RoutedFFN(E=4, top_k=2, F=12, shared_F=6, shared_gate=True, bias=True))
    spec = dataclasses.replace(ODD, layers=(ODD.layers[0], routed), name="mixed")
    model = _random(spec)
    assert {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()} == {(tensor.name, tensor.shape) for tensor in model_tensors(spec)}
    (logits,) = packed_logits(model, [torch.arange(9)])
    assert logits.isfinite().all()


MIXED = WeightPlan(default="int8", exceptions={"lm_head": "bf16", "0:down": "fp16"})


@pytest.mark.parametrize("plan", [FP32, WeightPlan(default="bf16"), WeightPlan(default="int8"), MIXED], ids=WeightPlan.describe)
def test_bytes_are_those_of_the_plan(plan):
    spec = dataclasses.replace(ODD, tied=False)
    model = Transformer(spec, plan, max_context=8)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == weight_bytes(spec, plan)


def test_logits_of_chosen_rows():
    model = _random(ODD)
    batch = StepBatch.packed([6])
    hidden_TD = model(torch.arange(6), positions_of(batch.spans), batch)
    rows = torch.tensor([5, 2])
    torch.testing.assert_close(model.logits(hidden_TD, rows), model.logits(hidden_TD)[rows])
    assert model.logits(hidden_TD).dtype == torch.float32 and model.logits(hidden_TD).abs().max() <= 3.0


def test_a_layer_can_be_wrapped_from_outside():
    """What a streamed layer will do: stand in the list, do something, call what it wraps."""

    class Counted(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, *arguments):
            self.calls += 1
            return self.inner(*arguments)

    model = _random(ODD)
    (before,) = packed_logits(model, [torch.arange(5)])
    model.layers[1] = counted = Counted(model.layers[1])
    assert torch.equal(packed_logits(model, [torch.arange(5)])[0], before) and counted.calls == 1


def test_refusals():
    with pytest.raises(UnsupportedError, match="no kernel yet"):
        Transformer(dataclasses.replace(ODD, plan_only="no kernel yet"), FP32, max_context=8)
    with pytest.raises(InputError, match="learned positions for 16"):
        Transformer(dataclasses.replace(ODD, learned_positions=16), FP32, max_context=17)
    with pytest.raises(UnsupportedError, match="ALiBi"):
        Transformer(dataclasses.replace(ODD, layers=(LayerSpec(mixer=Attention(N=1, K=1, H=8, alibi=True), ffn=None),)), FP32, max_context=8)
