"""How near a step comes to the time that its reads and writes alone would take."""

from .common import DTYPES, make


def median_ratio(contenders):
    """Return how many times as long as the first the second takes."""
    from fastadam.bench.measure import compare, spread

    return spread(compare(*contenders, rounds=9).ratios).median


class Roofline:
    """Interleaved on this machine, so that the figure outlasts its moods."""

    beside = "roofline"
    param_names = ("workload", "dtype")
    params = (["micro", "mlp", "many", "20M", "gpt2"], DTYPES)
    unit = "fraction"
    timeout = 300

    def setup(self, name, dtype):
        self.contenders = [make(each, name, dtype) for each in ("fastadam", self.beside)]

    def track_fraction_of_roofline(self, *_):
        return median_ratio(self.contenders)


class Divider(Roofline):
    """The same, beside a pass that also takes a square root and divides."""

    beside = "divider"
