"""How near a step comes to the time that its reads and writes alone would take."""

from .common import DTYPES, make, shapes_of


class Roofline:
    """Interleaved on this machine, so that the figure outlasts its moods."""

    param_names = ("workload", "dtype")
    params = (["micro", "mlp", "many", "20M", "gpt2"], DTYPES)
    unit = "fraction"
    timeout = 300

    def setup(self, name, dtype):
        self.contenders = [make(each, shapes_of(name), dtype) for each in ("fastadam", "roofline")]

    def track_fraction_of_roofline(self, *_):
        from fastadam.bench.measure import compare, spread

        return spread(compare(*self.contenders, rounds=9).ratios).median


class Divider(Roofline):
    """The same, beside a pass that also takes a square root and divides."""

    def setup(self, name, dtype):
        self.contenders = [make(each, shapes_of(name), dtype) for each in ("fastadam", "divider")]
