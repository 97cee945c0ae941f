"""What stands in for a device and for an engine in the tests of engines that offload."""

import contextlib
import types

import torch


class Stream:
    """A stream, and an event, of a device that does everything at once."""

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return self

    def wait(self, stream):
        pass

    def synchronize(self):
        pass


class TorchOnThisCPU:
    """Torch as a module sees it that asks for CUDA's streams and for pinned memory."""

    cuda = types.SimpleNamespace(
        Stream=Stream, current_stream=Stream, stream=contextlib.nullcontext
    )

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return found
        return lambda *args, **options: found(*args, **{**options, "pin_memory": False})


class OnDevice(torch.nn.Parameter):
    """A parameter that an engine takes for one on a CUDA device."""

    is_cuda = True


def new_params(shapes, dtype=torch.float32, kind=torch.nn.Parameter):
    draws = torch.Generator().manual_seed(0)
    return [kind(torch.randn(shape, generator=draws).to(dtype)) for shape in shapes]


def backward(params, step):
    """Run backward to gradients that are drawn for the step."""
    draws = torch.Generator().manual_seed(step + 1)
    grads = [torch.randn(param.shape, generator=draws) for param in params]
    sum((p * g.to(p.dtype)).sum() for p, g in zip(params, grads, strict=True)).backward()


def train(params, engine, steps):
    for step in steps:
        backward(params, step)
        engine.step()
        engine.zero_grad()


# What DeepSpeed 0.19.8 and Megatron-core 0.16.1 do with an optimizer. Each makes copies of the
# parameters' values ("masters"), one tensor for each of the optimizer's groups.


class Zero12:
    """As `_optimizer_step` in deepspeed/runtime/zero/stage_1_and_2.py, without partitions."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.held = [group["params"] for group in optimizer.param_groups]
        self.masters = [flat(params).requires_grad_() for params in self.held]
        for group, master in zip(optimizer.param_groups, self.masters, strict=True):
            group["params"] = [master]

    def step(self):
        for k, (params, master) in enumerate(zip(self.held, self.masters, strict=True)):
            self.step_of(k, master, flat([param.grad for param in params]), params)

    def step_of(self, k, master, grad, params):
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[k]]
        master.grad = grad
        self.optimizer.step()
        unflat(master, params)
        self.optimizer.param_groups = groups

    def zero_grad(self):
        for params in self.held:
            for param in params:
                param.grad = None

    def state_dict(self):
        return self.optimizer.state_dict(), [master.detach().clone() for master in self.masters]

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state[0])
        for master, saved, params in zip(self.masters, state[1], self.held, strict=True):
            master.data.copy_(saved)
            unflat(master, params)


class Zero3(Zero12):
    """As `_optimizer_step` and `_rigid_state_dict` in deepspeed/runtime/zero/stage3.py."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.clear()

    def clear(self):
        for group in self.optimizer.param_groups:
            group["params"] = []

    def fill(self):
        for group, master in zip(self.optimizer.param_groups, self.masters, strict=True):
            group["params"].append(master)

    def step_of(self, k, master, grad, params):
        self.optimizer.param_groups[k]["params"] = [master]
        master.grad = grad
        self.optimizer.step()
        unflat(master, params)
        self.optimizer.param_groups[k]["params"] = []

    def state_dict(self):
        self.fill()
        state = super().state_dict()
        self.clear()
        return state

    def load_state_dict(self, state):
        self.fill()
        super().load_state_dict(state)
        self.clear()


class Zero3OnDisk(Zero3):
    """As with "nvme", in deepspeed/runtime/swap_tensor/optimizer_utils.py: SwapTensorContext.

    Between steps the master and its state have no memory; at each step they have other memory.
    """

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.files = [{} for _ in self.masters]

    def tensors(self, master):
        state = self.optimizer.state.get(master, {})
        # A count is too small to be swapped.
        return {"master": master} | {name: state[name] for name in state if name != "step"}

    def swap_in(self, k, master):
        for name, tensor in self.tensors(master).items():
            if name in self.files[k]:
                tensor.data = self.files[k].pop(name)

    def swap_out(self, k, master):
        master.grad = None
        for name, tensor in self.tensors(master).items():
            self.files[k][name] = tensor.detach().clone()
            tensor.data = torch.Tensor()

    def step_of(self, k, master, grad, params):
        self.swap_in(k, master)
        super().step_of(k, master, grad, params)
        self.swap_out(k, master)

    def state_dict(self):
        for k, master in enumerate(self.masters):
            self.swap_in(k, master)
        return super().state_dict()


class Hybrid(torch.optim.Optimizer):
    """As HybridDeviceOptimizer in megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py."""

    def __init__(self, params, adamw, **options):
        super().__init__(params, {"cpu_optimizer_cls": adamw, **options})
        self.masters, self.optimizers = {}, []
        for group in self.param_groups:
            for param in group["params"]:
                master = self.masters[param] = param.detach().clone().float()
                self.optimizers.append(adamw([{**group, "params": [master]}]))
                self.optimizers[-1].register_step_post_hook(self.copier(param, master))

    @staticmethod
    def copier(param, master):
        def copy_back(*_):
            param.data.copy_(master.data)

        return copy_back

    def step(self, closure=None):
        params = list(self.masters.items())
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for optimizer, (param, master) in zip(self.optimizers, params, strict=True):
            settings = {k: v for k, v in groups[param].items() if k != "params"}
            optimizer.param_groups = [{**g, **settings} for g in optimizer.param_groups]
            master.grad = param.grad.float()
        for optimizer in self.optimizers:
            optimizer.step(closure)
        self.state.clear()
        for optimizer, (param, master) in zip(self.optimizers, params, strict=True):
            self.state[param] = optimizer.state[master]
            self.state[param]["master_param"] = master


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).float()


def unflat(master, params):
    parts = master.detach().split([param.numel() for param in params])
    for param, part in zip(params, parts, strict=True):
        param.data.copy_(part.view(param.shape))
