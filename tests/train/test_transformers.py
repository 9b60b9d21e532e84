"""The same initial weights, data order and hyperparameters in transformers: the same losses, step by step."""

from __future__ import annotations

import pytest
import torch
import transformers

from tradespace.build_training import build_model, fill, prepare
from tradespace.loading.safetensors import read_sharded
from tradespace.spec.families import model_spec_from_config
from tradespace.spec.training import TrainPlan, every
from tradespace.spec.weights import WeightPlan
from tradespace.train.data import Order, pack
from tradespace.train.loop import Limits, Trainer, next_token
from tradespace.train.optimizer import Hyper, Optimizer
from tradespace.train.schedule import Schedule
from train.small import V, documents


def test_losses_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    theirs = transformers.LlamaForCausalLM(config).float()
    theirs.save_pretrained(tmp_path)
    spec = model_spec_from_config(config.to_dict(), "small")
    plan = TrainPlan(model="small", weights=WeightPlan(default="fp32"), context=48, micro_batch=2, checkpointing=every(2, 3))
    model = build_model(spec, plan.weights, context=48)
    fill(model, read_sharded(tmp_path), spec)
    parameters = prepare(model, plan, 0)
    stream = documents(1, 2000)
    data = pack(stream, 48)
    optimizer = Optimizer("adamw", parameters, Hyper(lr=2e-3, decay=0.01))
    schedule = Schedule(lr=2e-3, steps=15, warmup=3, shape="linear")
    trainer = Trainer(model, parameters, optimizer, data, Order(len(data), 2, 1, 0, shuffle=False), schedule, next_token(50), Limits(steps=15))
    matrices = [parameter for parameter in theirs.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.dim() == 1]
    oracle = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=2e-3)
    ramp = transformers.get_linear_schedule_with_warmup(oracle, 3, 15)
    ids = torch.tensor(stream[0].ids[: len(data) * 48]).view(-1, 48)
    for step in range(15):
        batch = ids[2 * step : 2 * step + 2]
        want = theirs(input_ids=batch, labels=batch).loss
        want.backward()
        oracle.step()
        ramp.step()
        oracle.zero_grad()
        assert trainer.advance().loss == pytest.approx(float(want.detach()), abs=1e-4), f"step {step + 1}"
