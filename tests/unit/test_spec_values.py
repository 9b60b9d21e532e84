"""Specs are values: equal ones hash alike in every process, also after they went through a pickle."""

import pickle
import subprocess
import sys

import pytest

from tradespace.spec.kv import KVPlan
from tradespace.spec.zoo import find_model

VALUES = {"model": find_model("llama-2-7b"), "cache": KVPlan(store="int8")}
_FRESH = """
import pickle, sys
from tradespace.spec.kv import KVPlan
from tradespace.spec.zoo import find_model
found = pickle.load(sys.stdin.buffer)
assert {found: 1}.get(find_model("llama-2-7b") if sys.argv[1] == "model" else KVPlan(store="int8")) == 1
"""


@pytest.mark.parametrize("name", VALUES)
def test_a_remembered_hash_stays_in_its_process(name):
    value = VALUES[name]
    assert hash(value) == hash(value)  # remembered from here on
    for seed in ("1", "2"):  # in at least one of them strings hash otherwise than here
        subprocess.run(
            [sys.executable, "-c", _FRESH, name], input=pickle.dumps(value), check=True, env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        )
    assert pickle.loads(pickle.dumps(value)) == value
