"""Torch's parameters on the CPU, and torch's own files."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastadam
from fastadam.state.torch_load import allow_arrays_in_torch_load

pytest.importorskip("torch", exc_type=ImportError)
from fastadam.torch import CPUParams

QUICKSTART = Path(__file__).parents[2] / "docs" / "quickstart.md"


@pytest.fixture
def torch(optional):
    return optional("torch")


def recipe():
    blocks = re.findall(r"^```python\n(.*?)^```$", QUICKSTART.read_text("utf-8"), re.M | re.S)
    (block,) = (block for block in blocks if "import torch" in block)
    return block


@pytest.mark.parametrize("zero_grad", ["model.zero_grad()", "model.zero_grad(False)", ""])
def test_the_quickstarts_recipe(torch, zero_grad, capsys):
    """As it is written, with gradients kept in place, and with fastadam's own zeros."""
    code = recipe()
    assert code.count("model.zero_grad()") == 1
    code = code.replace("model.zero_grad()", zero_grad)
    if not zero_grad:
        code = code.replace("params.grads()", "params.grads(), zero_grad=True")
    torch.manual_seed(0)
    exec(code, {"__name__": "__main__"})
    assert float(capsys.readouterr().out) < 0.05


def test_memory_is_shared(torch):
    model = torch.nn.Linear(3, 2)
    params = CPUParams(model.named_parameters())
    opt = fastadam.Adam(params.arrays, lr=0.5)
    model.bias.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(3)).sum().backward()
    grads = params.grads()
    assert grads["bias"] is None
    assert np.shares_memory(grads["weight"], model.weight.grad.numpy())
    opt.step(grads, zero_grad=True)
    assert not model.weight.grad.any()
    torch.testing.assert_close(model.weight, before[0] - 0.5, check_dtype=True)
    assert torch.equal(model.bias, before[1])


@pytest.mark.parametrize(
    "replace",
    [
        lambda torch, model: setattr(model.weight, "data", torch.zeros(2, 3)),
        lambda torch, model: model.to(torch.float64),
        lambda torch, model: model.half(),  # noqa: ARG005
    ],
    ids=["data", "to", "half"],
)
def test_other_memory_is_noticed(torch, replace):
    model = torch.nn.Linear(3, 2)
    params = CPUParams(dict(model.named_parameters()))
    opt = fastadam.Adam(params.arrays)
    model(torch.ones(3)).sum().backward()
    opt.step(params.grads())
    with torch.no_grad():
        model.weight.copy_(torch.zeros(2, 3))
        model.bias.data.copy_(torch.zeros(2))
    opt.step(params.grads())
    replace(torch, model)
    with pytest.raises(ValueError, match=r"^'weight' must keep the memory .* param.data = other"):
        opt.step(params.grads())
    assert opt.step_count == 2


def test_backward_has_not_been_called(torch):
    params = CPUParams(torch.nn.Linear(3, 2).named_parameters())
    opt = fastadam.Adam(params.arrays)
    with pytest.raises(ValueError, match=r"got None for all 2 parameters; .*torch, .grad is None"):
        opt.step(params.grads())


def test_on_another_device(torch):
    param = torch.empty(2, device="meta")
    with pytest.raises(ValueError, match=r"^'w' must be on the CPU, got one on meta$"):
        CPUParams({"w": param})


def test_what_has_no_names(torch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    for given, got in [
        (model, "Sequential"),
        (model[0], "Linear"),
        (model.parameters(), "a Parameter in it"),
        (torch.ones(2), "a Tensor in it"),
        (3, "int"),
    ]:
        with pytest.raises(TypeError) as caught:
            CPUParams(given)
        assert str(caught.value) == (
            f"named_parameters must be pairs of name and tensor, got {got};"
            " give model.named_parameters()"
        )


class OwnModel:
    """As a user's, whose class is in no module of torch."""

    def named_parameters(self):
        raise AssertionError


@pytest.mark.parametrize(
    "give",
    [
        lambda model: model,
        lambda model: model[0],
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: model[0].weight,
        lambda model: OwnModel(),  # noqa: ARG005
    ],
    ids=["sequential", "linear", "parameters", "named", "tensor", "own"],
)
def test_a_model_in_the_place_of_arrays(torch, give):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    hint = "fastadam.torch.CPUParams(model.named_parameters()).arrays"
    with pytest.raises(TypeError, match=f"{re.escape(hint)}$"):
        fastadam.Adam(give(model))


def test_the_wrong_part_of_cpu_params(torch):
    params = CPUParams(torch.nn.Linear(3, 2).named_parameters())
    with pytest.raises(TypeError, match=r"got CPUParams; give its \.arrays$"):
        fastadam.Adam(params)
    for container in (params.arrays, list(params.arrays.values()), [{"params": params.arrays}]):
        opt = fastadam.Adam(container)
        with pytest.raises(TypeError, match=r"got CPUParams; give what its .grads\(\) returns$"):
            opt.step(params)
        with pytest.raises(TypeError, match=r"got method; give what it returns$"):
            opt.step(params.grads)
        assert opt.step_count == 0


def test_torch_loads_a_state_dict(torch):
    """With weights_only=True, its default."""
    params = {"w": np.ones((2, 3), "f4", "F"), "b": np.ones(3), "0-d": np.ones(())}
    options = {"amsgrad": True, "ema_decay": 0.5, "lr": np.float32(0.5)}
    opt = fastadam.AdamW(params, **options)
    opt.step({name: np.ones_like(array) for name, array in params.items()})
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == opt.state_dict()["param_groups"]
    other = fastadam.AdamW({name: np.ones_like(a) for name, a in params.items()}, amsgrad=True,
                           ema_decay=0.5)  # fmt: skip
    other.load_state_dict(loaded)
    assert other.step_count == 1
    for name, state in opt.state.items():
        for kind, value in state.items():
            np.testing.assert_array_equal(other.state[name][kind], value, strict=True)


def test_torch_loads_a_state_dict_after_others_have_allowed_arrays_for_a_while(torch):
    """As transformers' Trainer does when it resumes: then it takes that back."""
    with torch.serialization.safe_globals([np.ndarray, np.dtype]):
        pass
    file = io.BytesIO()
    torch.save(fastadam.AdamW(np.ones(2)).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["state"].keys() == {0}


MADE = "import torch, fastadam, numpy; fastadam.Adam(numpy.ones(2))"
EXPORTED = """
import fastadam, numpy
opt = fastadam.Adam(numpy.ones(2))
import torch
opt.state_dict()
"""


@pytest.mark.parametrize("code", [MADE, EXPORTED], ids=["made", "exported"])
def test_a_program_with_both_need_import_nothing_else(torch, code, tmp_path):
    torch.save(fastadam.Adam(np.ones(2)).state_dict(), tmp_path / "state.pt")
    code += f"""
print(torch.load({str(tmp_path / "state.pt")!r})["state"][0]["exp_avg"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[0. 0.]\n", "")


@pytest.mark.parametrize("first", ["torch", "fastadam.torch"])
def test_in_whatever_order_they_are_imported(torch, first, tmp_path):
    torch.save(fastadam.Adam(np.ones(2)).state_dict(), tmp_path / "state.pt")
    code = f"""
import {first}
import fastadam.torch, torch
print(torch.load({str(tmp_path / "state.pt")!r})["state"][0]["exp_avg"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[0. 0.]\n", "")


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    allow_arrays_in_torch_load()
