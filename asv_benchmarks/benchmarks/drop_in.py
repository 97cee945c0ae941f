"""fastadam.torch in the place of torch's fused optimizer: a whole ``opt.step()``, interleaved."""

from .common import make
from .roofline import median_ratio

BOTH = ("fastadam-torch", "torch-fused")


class Torch:
    """How many times as long torch's fused Adam takes."""

    param_names = ("workload",)
    params = (["micro", "mlp", "many", "20M", "gpt2", "one-by-one"],)
    unit = "times as long"
    timeout = 300

    def setup(self, name):
        self.contenders = [make(each, name) for each in BOTH]

    def track_torch_fused(self, *_):
        return median_ratio(self.contenders)


class Groups(Torch):
    """The same, of 465 parameters in a group each, as where learning rates decay by layer.

    "scheduled" sets every group's before each step, as a scheduler does.
    """

    param_names = ("lr",)
    params = (["fixed", "scheduled"],)

    def setup(self, lr):
        self.contenders = [make(each, [(1_024,)] * 465) for each in BOTH]
        for each in self.contenders:
            opt = each.opt = each.make_optimizer(
                [{"params": [p], "lr": 1e-3 * 0.9 ** (k // 20)} for k, p in enumerate(each.params)]
            )
            each.step = opt.step if lr == "fixed" else scheduled(opt)
            each.step()


def scheduled(opt):
    """Return a step that makes every learning rate a little smaller."""

    def step():
        for group in opt.param_groups:
            group["lr"] *= 1 - 1e-6
        opt.step()

    return step
