"""Adapters beside PEFT: the same gradients, the same files both ways, codes underneath, several in one batch, merged."""

from __future__ import annotations

import peft
import pytest
import torch

from cli.tiny_model import oracle, save_folder
from tradespace import api
from tradespace.adapt.frozen import transposed_product
from tradespace.adapt.lora import Shape, adapter_names, adapter_parameters, lora, merge
from tradespace.adapt.peft_files import load_adapter, published_names, save_adapter
from tradespace.adapt.recompute import recompute
from tradespace.build_training import build_model, fill, prepare
from tradespace.errors import InputError, UnsupportedError
from tradespace.kernels.view import Span, StepBatch, positions_of
from tradespace.loading.resolve import resolve
from tradespace.loading.safetensors import read_sharded
from tradespace.spec.training import TrainPlan, every, parse_checkpointing, qlora_weights, trained
from tradespace.spec.weights import WeightPlan
from tradespace.train.loss import chunked_loss, cross_entropy
from train.small import small_model, small_spec

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("tiny"))


def _ours(folder, weights=None):
    files = resolve(str(folder))
    spec = api.spec_of_files(files)
    model = build_model(spec, weights or WeightPlan(default="fp32"), context=64)
    fill(model, read_sharded(files.folder), spec)
    return model


def _theirs(folder):
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    return found.eval()


def _loss(model, ids):
    batch = StepBatch.packed([len(ids)])
    targets = torch.cat([ids[1:], torch.tensor([-100])])
    return chunked_loss(model, model(ids, positions_of(batch.spans), batch), cross_entropy(targets), scale=1 / (len(ids) - 1), chunk=9)


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_gradients_are_pefts(folder, tmp_path, policy):
    theirs = _theirs(folder)
    theirs.save_pretrained(tmp_path)
    model = _ours(folder)
    shape = load_adapter(model, tmp_path, name="default", learn=True)
    assert (shape.rank, shape.alpha) == (4, 8.0)
    recompute(model, parse_checkpointing(policy, model.spec.L))
    ids = torch.randint(6, model.spec.V, (23,))
    loss = _loss(model, ids)
    loss.backward()
    want = theirs(input_ids=ids[None], labels=ids[None]).loss
    want.backward()
    assert float(loss) == pytest.approx(float(want), abs=1e-5)
    names = published_names(model.spec)
    slopes = {name.replace(".default", ""): parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    seen = 0
    for key, parameter in adapter_parameters(model).items():
        tensor, _, rest = key.partition(".lora_")
        kind, part = rest.split(".")
        other = slopes[f"base_model.model.{names[tensor, int(part)]}.lora_{kind}.weight"]
        assert (parameter.grad - other).norm() / other.norm() < 1e-4, key
        seen += 1
    assert seen == len(slopes) == 28


def test_ours_opens_in_peft(folder, tmp_path):
    import transformers

    model = _ours(folder)
    shape = Shape(rank=4, alpha=12.0)
    lora(model, shape, learn=True, seed=5)
    for key, parameter in adapter_parameters(model).items():
        parameter.data.normal_(std=0.1) if ".lora_B." in key else None
    save_adapter(model, tmp_path, shape, base=str(folder))
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path).eval()
    ids = torch.randint(6, model.spec.V, (17,))
    batch = StepBatch.packed([17])
    with torch.no_grad():
        ours = model.logits(model(ids, positions_of(batch.spans), batch))
        torch.testing.assert_close(ours, theirs(input_ids=ids[None]).logits[0], atol=1e-4, rtol=1e-4)
        merge(model)
        torch.testing.assert_close(model.logits(model(ids, positions_of(batch.spans), batch)), ours, atol=1e-4, rtol=1e-4)


def test_several_adapters_in_one_batch(folder):
    """Three sequences of one step, of two adapters and none: each as if it were alone with its own merged."""
    model = _ours(folder)
    for number, name in enumerate(("one", "two")):
        lora(model, Shape(rank=3 + number), name=name, seed=number)
        for parameter in adapter_parameters(model, name).values():
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    assert adapter_names(model) == ["one", "two"]
    ids = [torch.randint(6, model.spec.V, (length,)) for length in (9, 5, 7)]
    spans = [Span(0, 9, 9, adapter=1), Span(9, 5, 5), Span(14, 7, 7, adapter=0)]
    with torch.no_grad():
        batch = StepBatch.from_spans(spans)
        together = model.logits(model(torch.cat(ids), positions_of(spans), batch)).split([9, 5, 7])
        for found, own, name in zip(together, ids, ("two", None, "one"), strict=True):
            single = _ours(folder)
            if name is not None:
                lora(single, Shape(rank=3 + (name == "two")), name=name)
                for key, parameter in adapter_parameters(single, name).items():
                    parameter.data.copy_(adapter_parameters(model, name)[key])
                merge(single, name)
            alone = StepBatch.packed([len(own)])
            torch.testing.assert_close(found, single.logits(single(own, positions_of(alone.spans), alone)), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("fmt", ["nf4", "nf4-plain", "int4", "int8", "fp8"])
def test_gradients_pass_through_codes(fmt):
    """QLoRA's gradients are those of the same weights decoded."""
    spec = small_spec(D=64, F=192)
    coded = small_model(spec, "fp32")
    dense = coded
    held = build_model(spec, qlora_weights(fmt, "fp32"), context=64)
    held.dtype = torch.float32
    from tradespace.quantize.rtn import fill_rtn

    for layer, other in zip(held.layers, dense.layers, strict=True):
        for name in ("attn.qkv", "attn.out", "ffn.gate_up", "ffn.down"):
            weight, source = layer.get_submodule(name), other.get_submodule(name)
            fill_rtn(weight, 0, source.weight.detach().clone() * 20, name=name)
            x = torch.randn(5, weight.shape[1], dtype=weight.dtype)
            dy = torch.randn(5, weight.shape[0], dtype=weight.dtype)
            want = dy.float() @ weight.dense_rows(0, weight.shape[0]).float()
            found = transposed_product(weight, dy).float()
            assert (found - want).norm() / want.norm() < (1e-2 if weight.dtype == torch.bfloat16 else 1e-5), name
            assert weight.linear(x).shape == (5, weight.shape[0])


@pytest.mark.parametrize("tables", ["bf16", "int8"])
def test_qlora_learns_and_merging_codes_is_refused(folder, tables):
    model = _ours(folder, qlora_weights("nf4", tables))
    assert model.embed.format_name == tables
    plan = TrainPlan(model="tiny", method="qlora", weights=qlora_weights("nf4", tables), rank=4, checkpointing=every(1, 2), context=32)
    parameters = prepare(model, plan, 0)
    assert [(name, tuple(value.shape)) for name, value in parameters.items()] == [(name, shape) for name, shape, _ in trained(model.spec, plan)]
    ids = torch.randint(6, model.spec.V, (32,))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = _loss(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    with pytest.raises(UnsupportedError, match="rounded away"):
        merge(model)


def test_adapters_of_another_model_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no adapter_config.json"):
        load_adapter(_ours(folder), tmp_path, name="x")
    wide = small_model(small_spec(L=2, D=64))
    lora(wide, Shape(rank=2))
    save_adapter(wide, tmp_path, Shape(rank=2), base="wide")
    with pytest.raises(InputError, match="has shape"):
        load_adapter(_ours(folder), tmp_path, name="x")
    assert oracle().config.hidden_size == 32
