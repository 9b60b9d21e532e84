"""Torch without its registrations for tensors that have no data: models run the same, and whoever needs them has them."""

import subprocess
import sys

import pytest

BEGIN = "from tradespace import light_torch\nassert light_torch.begin()\nimport sys, torch\nassert 'torch._decomp' not in sys.modules\n"
IS_WHOLE = (
    "assert type(sys.modules['torch._meta_registrations']).__name__ == 'module' and torch._meta_registrations is sys.modules['torch._meta_registrations']"
)


def python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "use",
    [
        "torch.compile(lambda x: torch.nn.functional.gelu(x).softmax(-1), backend='aot_eager')(torch.randn(3, 4))",
        "torch.export.export(torch.nn.Linear(3, 4), (torch.randn(2, 3),))",
        "from torch._subclasses import FakeTensorMode\nwith FakeTensorMode(): assert torch.linalg.svd(torch.empty(3, 4))[1].shape == (3,)",
        "import torch._decomp",
        "assert torch._meta_registrations.meta_index_Tensor",
        "light_torch.complete()\nids = torch.ones(2, 2, dtype=torch.int64, device='meta')\n"
        "assert torch.nn.functional.embedding_bag(ids, torch.empty(9, 4, device='meta')).shape == (2, 4)",
    ],
)
def test_what_needs_the_rest_gets_it(use, environment):
    python(f"{BEGIN}{use}\n{IS_WHOLE}\nlight_torch.complete()", environment)


@pytest.mark.parametrize("first", ["torch._decomp", "torch._refs", "torch._prims", "torch._dynamo"])
def test_tables_are_those_of_a_whole_torch(first, environment):
    """Whatever is imported first: no module runs twice, which would leave empty tables."""
    count = f"import torch, {first}, torch._decomp as d\nassert sys.modules['{first}'].__spec__.origin\n"
    count += "print(len(d.decomposition_table), len(d.meta_table), len(torch._prims.__all__), len(torch._refs.__all__))"
    light, whole = python(BEGIN + count, environment), python("import sys\n" + count, environment)
    assert light == whole


def test_running_and_training_a_little_does_without(environment):
    code = (
        "x = torch.randn(4, 8, requires_grad=True)\ny = torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]).sum()\ny.backward()\n"
        "torch.empty(3, device='meta') + 1\nassert 'torch._decomp' not in sys.modules"
    )
    python(BEGIN + code, environment)


def test_begin_does_nothing_where_it_is_too_late_or_torch_is_another(environment):
    python("import torch\nfrom tradespace import light_torch\nassert not light_torch.begin()\nlight_torch.complete()", environment)
    code = "from tradespace import light_torch\nlight_torch._installed = lambda: '9.0'\nassert not light_torch.begin()\nimport torch, sys\n"
    python(code + "assert 'torch._decomp' in sys.modules", environment)


@pytest.mark.parametrize("flags", [(), ("--attention", "sdpa", "--weights", "int8"), ("--attention", "chunked", "--kv-store", "int8")], ids=" ".join)
def test_commands_that_run_models_do_without(shell, cli, folder, flags):
    """The same text as from a process with all of torch, this one."""
    import torch._decomp  # noqa: F401

    command = ("run", folder, "once", "--max-tokens", "6", "--json", *flags)
    light = shell(
        *command, before="import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, 'torch._decomp' in sys.modules, file=sys.stderr))"
    )
    assert light.code == 0, light.err
    assert light.err.splitlines()[-1] == "True False"
    whole = cli(*command)
    assert whole.code == 0
    assert [done.json["completions"][0]["text"] for done in (light, whole)] == [whole.json["completions"][0]["text"]] * 2
