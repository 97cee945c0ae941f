"""CPU offload: the model on a device, the state of AdamW and its update on the host.

Run it, `python cpu_offload.py --device cuda`, or copy what is above `make_model`. Without a GPU
the "device" is the CPU too, and the same lines run.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

import fastadam.torch


class Slot:
    """One parameter on the device, its master copy on the host, its places in the buffers."""

    def __init__(self, param, master, grad, outgoing):
        self.param, self.grad, self.outgoing = param, grad, outgoing
        self.master = torch.nn.Parameter(master)
        self.incoming = None  # where a gradient arrives that must be cast, or added to grad
        self.empty = True  # no gradient since zero_grad


class Bucket:
    """Parameters of one dtype that are updated together: flat buffers, and an optimizer."""

    def __init__(self, params, groups, param_groups):
        self.params, self.dtype = params, params[0].dtype
        full = torch.promote_types(self.dtype, torch.float32)
        self.master, grad = self.buffer(full), self.buffer(full)
        self.outgoing = self.master if full == self.dtype else self.buffer(self.dtype)
        views = map(self.views, (self.master, grad, self.outgoing))
        self.slots = [Slot(*each) for each in zip(params, *views, strict=True)]
        self.groups = sorted(set(groups))  # the groups of its parameters, by their places
        masters = {k: [] for k in self.groups}
        for slot, k in zip(self.slots, groups, strict=True):
            masters[k].append(slot.master)
        self.optimizer = fastadam.torch.AdamW(
            {**param_groups[k], "params": masters[k]} for k in self.groups
        )
        self.arrived, self.job, self.sent = {}, None, None

    def buffer(self, dtype):
        pin = (
            self.params[0].is_cuda and dtype == self.dtype
        )  # if it is copied from or to the device
        size = sum(param.numel() for param in self.params)
        return torch.empty(size, dtype=dtype, device="cpu", pin_memory=pin)

    def views(self, flat):
        parts = flat.split([param.numel() for param in self.params])
        return [part.view_as(param) for part, param in zip(parts, self.params, strict=True)]

    def place_for(self, slot):
        """Return where a gradient is to arrive: at once in grad, unless it is cast or added."""
        if slot.empty and slot.grad.dtype == self.dtype:
            return slot.grad
        if slot.incoming is None:
            for each, view in zip(self.slots, self.views(self.buffer(self.dtype)), strict=True):
                each.incoming = view
        return slot.incoming

    def wait(self):
        """Wait for the gradients that are on their way; raise here what the worker raised."""
        job, self.job = self.job, None
        if job is not None:
            job.result()


@torch.no_grad()
def receive(slots, event):
    """Wait for gradients to be on the host, cast them or add them up: the worker's job."""
    event.synchronize()
    for slot in slots:
        if not slot.empty:
            slot.grad.add_(slot.incoming)
        elif slot.grad.dtype != slot.param.dtype:
            slot.grad.copy_(slot.incoming)
        slot.master.grad, slot.empty = slot.grad, False


class CPUOffload(torch.optim.Optimizer):
    """AdamW for parameters on a device, with its state and its update on the host.

    Parameters, groups and options are those of `fastadam.torch.AdamW`. All parameters are on
    one device. ``bucket_size`` counts elements.
    """

    def __init__(self, params, *, bucket_size=2**24, max_grad_norm=None, **options):
        super().__init__(params, fastadam.torch.AdamW([torch.zeros(1)], **options).defaults)
        self.max_grad_norm, self.grad_norm = max_grad_norm, None
        pairs = [(p, k) for k, g in enumerate(self.param_groups) for p in g["params"]]
        runs, size = [], 0
        for param, k in reversed(pairs):  # the usual order of backward
            if not param.requires_grad:
                continue
            size += param.numel()
            if not runs or size > bucket_size or param.dtype != runs[-1][0][0].dtype:
                runs.append([])
                size = param.numel()
            runs[-1].append((param, k))
        runs = [sorted(run, key=lambda pair: pair[1]) for run in runs]
        self.buckets = [Bucket(*zip(*run, strict=True), self.param_groups) for run in runs]
        # The streams and events of torch.cpu do nothing: a copy is over when it returns.
        self.lib = torch.cuda if pairs[0][0].is_cuda else torch.cpu
        self.down, self.up = self.lib.Stream(), self.lib.Stream()
        self.worker = ThreadPoolExecutor(1)
        self.leaving = None  # the event and the gradients of the bucket that was closed last
        for bucket in self.buckets:
            bucket.sent = self.mark(self.up)
            for slot in bucket.slots:
                hook = partial(self.on_gradient, bucket, slot)
                slot.param.register_post_accumulate_grad_hook(hook)
        self.read_params()

    def mark(self, stream):
        event = self.lib.Event()
        event.record(stream)
        return event

    @torch.no_grad()
    def read_params(self):
        """Read the model's parameters into the master copies: after you have written to them."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.master.copy_(slot.param)

    def on_gradient(self, bucket, slot, param):
        """Start to copy a gradient to the host: backward calls this when it is complete."""
        if slot in bucket.arrived:  # the backward before gave the bucket's others no gradient
            self.close(bucket)
        if not bucket.arrived:
            bucket.wait()  # then its buffers are free again
        self.down.wait_stream(self.lib.current_stream())
        with self.lib.stream(self.down):
            bucket.place_for(slot).copy_(param.grad, non_blocking=True)
        # The copy has yet to run, so the gradient is held, until close lets go of it.
        bucket.arrived[slot], param.grad = param.grad, None
        if len(bucket.arrived) == len(bucket.slots):
            self.close(bucket)

    def close(self, bucket):
        """Give a bucket to the worker, and free the gradients of the one closed before."""
        event, arrived, bucket.arrived = self.mark(self.down), bucket.arrived, {}
        if self.leaving is not None:  # what uses their memory next, runs after they are copied
            self.lib.current_stream().wait_event(self.leaving[0])
        self.leaving = event, arrived
        bucket.job = self.worker.submit(receive, list(arrived), event)

    def wait(self):
        """Wait until all gradients are on the host."""
        for bucket in self.buckets:
            if bucket.arrived:
                self.close(bucket)
        for bucket in self.buckets:
            bucket.wait()
        self.leaving = None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = None
        if self.max_grad_norm is not None:
            self.wait()
            masters = [slot.master for bucket in self.buckets for slot in bucket.slots]
            grads = [master.grad for master in masters if master.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(grads, error_if_nonfinite=True)
            scale = ((self.grad_norm.double() + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        self.up.wait_stream(self.lib.current_stream())  # backward may still read the parameters
        for bucket in self.buckets:
            if bucket.arrived:  # some of its parameters had no gradient
                self.close(bucket)
            bucket.wait()
            for k, own in zip(bucket.groups, bucket.optimizer.param_groups, strict=True):
                own.update({**self.param_groups[k], "params": own["params"]})
            bucket.sent.synchronize()  # the copies of the step before have read the master
            bucket.optimizer.grad_scale = scale
            bucket.optimizer.step()
            if bucket.outgoing is not bucket.master:
                bucket.outgoing.copy_(bucket.master)
            with self.lib.stream(self.up):
                for slot in bucket.slots:
                    if not slot.empty:
                        slot.param.copy_(slot.outgoing, non_blocking=True)
            bucket.sent = self.mark(self.up)
        self.leaving = None
        self.lib.current_stream().wait_stream(self.up)  # the next forward waits, the host does not
        return loss

    def zero_grad(self, set_to_none=True):  # noqa: ARG002 (they are None in any case)
        self.wait()
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.master.grad, slot.param.grad, slot.empty = None, None, True

    def state_dict(self):
        """Return a state that AdamW loads, with ``"master"`` where the model is less precise."""
        for bucket in self.buckets:
            states = bucket.optimizer.state_dict()["state"]
            for k, slot in enumerate(bucket.slots):
                if k in states and bucket.outgoing is not bucket.master:
                    self.state[slot.param] = {**states[k], "master": slot.master.detach()}
                elif k in states:
                    self.state[slot.param] = states[k]
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Load the state of AdamW or of this class. Load the model first."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        loaded = {p: {**state_dict["state"].get(k, {})} for p, k in zip(params, keys, strict=True)}
        self.read_params()
        for bucket in self.buckets:
            states = [loaded[slot.param] for slot in bucket.slots]
            for slot, own in zip(bucket.slots, states, strict=True):
                slot.master.copy_(own.pop("master", slot.master))
            state = {k: own for k, own in enumerate(states) if own}
            bucket.optimizer.load_state_dict({**bucket.optimizer.state_dict(), "state": state})

    def bytes_on_host(self):
        """Return the bytes per parameter that are kept on the host."""
        held = {}
        for bucket in self.buckets:
            for slot in bucket.slots:
                state = bucket.optimizer.state[slot.master].values()
                for tensor in (slot.master, slot.grad, slot.outgoing, slot.incoming, *state):
                    if tensor is not None:
                        held[tensor.data_ptr()] = tensor.nbytes
        return sum(held.values()) / sum(bucket.master.numel() for bucket in self.buckets)


def make_model(device="cpu", dtype=torch.float32):
    """Return a small transformer."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    layers = torch.nn.Embedding(64, 64), torch.nn.TransformerEncoder(layer, 2)
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 64)).to(device, dtype)


def train(model, optimizer, steps, accumulate=1):
    """Return the losses of so many steps, each of so many batches."""
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    draws = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            x = torch.randint(64, (16, 16), generator=draws).to(model[0].weight.device)
            logits, target = model(x).float(), (3 * x + 1) % 64
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target)
            (loss / accumulate).backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--accumulate", type=int, default=1)
    args = parser.parse_args()

    model = make_model(args.device)
    optimizer = fastadam.torch.AdamW(model.parameters(), lr=3e-3)
    plain = train(model, optimizer, args.steps, args.accumulate)
    model = make_model(args.device, getattr(torch, args.dtype))
    optimizer = CPUOffload(model.parameters(), lr=3e-3, bucket_size=2**15)
    offloaded = train(model, optimizer, args.steps, args.accumulate)
    for step in range(0, args.steps, 10):
        print(f"step {step:3}: loss {plain[step]:.6f} plain, {offloaded[step]:.6f} offloaded")
    print("all losses are equal" if plain == offloaded else "the losses differ")
    on_device, on_host = model[0].weight.element_size(), optimizer.bytes_on_host()
    print(f"bytes per parameter: {on_device} on the device, {on_host:.0f} on the host")


if __name__ == "__main__":
    main()
