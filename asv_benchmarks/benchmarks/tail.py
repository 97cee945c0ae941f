"""The whole tail of a training step: clip, update, decay, average, zero the gradients."""

from .common import BACKENDS, make


class Tail:
    """Beside the peers' own idioms."""

    param_names = ("backend", "workload")
    params = (BACKENDS, ["micro", "mlp", "many", "20M", "67M", "gpt2"])
    # Every step finds gradients that are not zeros: asv calls setup before each.
    number = 1
    timeout = 300
    contender = None

    def setup(self, backend, name):
        if self.contender is None:
            self.contender = make(backend, name, tail=True)
        self.contender.refill()
        self.step, self.wait = self.contender.step, self.contender.wait

    def time_tail(self, *_):
        self.step()
        self.wait()
