"""Files that are damaged, forged or absurd: refused with one error, or loaded whole.

Each batch runs in a process of its own, which this file is then the script of, under limits on
memory and time: a crash, a hang or another exception ends it, and the file it read stays there.
With FASTADAM_TEST_FULL=1, as many mutations as an issue asked for; else a sample of that.
"""

import contextlib
import copy
import faulthandler
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastadam
from fastadam import schedules
from fastadam.checkpoint import file_format

with contextlib.suppress(ImportError):  # Windows has none
    import resource

safetensors = pytest.importorskip("safetensors", exc_type=ImportError)

FULL = os.environ.get("FASTADAM_TEST_FULL") == "1"
MUTATIONS, MANY, EVERY = (20_000, 25_000, 1) if FULL else (600, 2_000, 20)
SEED = 20261122
EXTRA = {"epoch": 3, "text": "ö 漢 🙂 \x00 \ud800", "nested": [[{"a": None}], 1.5, True], "": {}}

# Bytes beyond what a process has that has loaded one checkpoint, and seconds for one file.
MEMORY, SECONDS = 2**30, 20


# The optimizers.


def make(seed, extra=EXTRA):
    """Return an optimizer in mid-training, its parameters included, and what to save with it."""
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.standard_normal((3, 4)).astype(np.float32),
        "f": np.asfortranarray(rng.standard_normal((2, 5))),
    }
    more = {"ö/w": rng.standard_normal(()), "none": np.zeros((0, 3))}
    opt = fastadam.Adam(
        params,
        lr=0.1 / seed,
        amsgrad=True,
        ema_decay=0.5,
        max_grad_norm=1.0 + seed,
        schedule=schedules.warmup(
            schedules.chain((schedules.cosine(50 + seed), 40), schedules.constant(0.5)), steps=4
        ),
    )
    opt.add_param_group({"params": more, "lr": 0.5})
    for _ in range(seed):
        grads = [{name: np.empty_like(p) for name, p in group.items()} for group in (params, more)]
        for grad in (*grads[0].values(), *grads[1].values()):
            grad[...] = rng.standard_normal(grad.shape)
        opt.step(grads)
    return opt, [*params.values(), *more.values()], extra


def picture(opt, params):
    """Return all that loading may change."""
    state = opt.state_dict()
    arrays = [*params, *(a for s in state["state"].values() for a in s.values())]
    options = [
        {name: value for name, value in group.items() if name != "params"}
        for group in opt.param_groups
    ]
    return (
        [np.array(a).tobytes() for a in arrays],
        opt.step_count,
        repr(options),
        repr((opt.schedule, opt.max_grad_norm, opt.nonfinite, opt.ema_decay, opt.amsgrad)),
    )


# Files, taken apart and put together.


def parts(raw):
    """Return the tensors' entries, the metadata, the description, and the tensors' bytes."""
    size = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + size])
    metadata = entries.pop("__metadata__")
    return entries, metadata, json.loads(metadata["fastadam"]), raw[8 + size :]


def file(header, data=b""):
    """Return a file of a header, as text or to become JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    text = text.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def whole(entries, metadata, said, data, *, forge=True):
    """Put a file together; forged, its header's checksum is right."""
    if said is not None:
        metadata = {**metadata, "fastadam": said if isinstance(said, str) else json.dumps(said)}
    if forge:
        with contextlib.suppress(Exception):  # there are entries that have no checksum
            rest = {name: text for name, text in metadata.items() if name != "fastadam_sha256"}
            layout = {name: (e["dtype"], e["shape"]) for name, e in entries.items()}
            metadata = {**rest, "fastadam_sha256": file_format._digest(rest, layout)}
    return file({"__metadata__": metadata, **entries}, data)


def nodes(tree, path=()):
    """Yield the way to each node of a tree of dicts and lists."""
    yield path
    inner = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in inner:
        yield from nodes(tree[key], (*path, key))


def put(tree, path, value):
    """Return a copy of a tree in which one node is another."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


# Mutations. Each takes the bytes, those of another checkpoint, and a generator of random numbers.


def span(raw, rng, longest=None):
    """Return a random range, likely a short one."""
    length = int(min(len(raw), 2 ** rng.uniform(0, np.log2(longest or len(raw)))))
    start = int(rng.integers(len(raw) - length + 1))
    return start, start + length


def flip_bits(raw, _, rng):
    raw = bytearray(raw)
    for place in rng.integers(len(raw), size=rng.integers(1, 9)):
        raw[place] ^= 1 << rng.integers(8)
    return bytes(raw)


def set_bytes(raw, _, rng):
    raw = bytearray(raw)
    for place in rng.integers(len(raw), size=rng.integers(1, 9)):
        raw[place] = rng.integers(256)
    return bytes(raw)


def set_characters(raw, _, rng):
    """Put what means something in JSON into the header."""
    raw = bytearray(raw)
    for place in rng.integers(8, int.from_bytes(raw[:8], "little"), size=rng.integers(1, 4)):
        raw[place] = rng.choice(list(b'{}[]",:\\ 0123456789-eE.untf'))
    return bytes(raw)


def truncate(raw, _, rng):
    return raw[: rng.integers(len(raw))]


def extend(raw, _, rng):
    more = rng.bytes(int(2 ** rng.uniform(0, 12)))
    return raw + (more if rng.random() < 0.5 else bytes(len(more)))


def cut(raw, _, rng):
    start, end = span(raw, rng)
    return raw[:start] + raw[end:]


def double(raw, _, rng):
    start, end = span(raw, rng)
    place = int(rng.integers(len(raw)))
    return raw[:place] + raw[start:end] + raw[place:]


def overwrite(raw, _, rng):
    """Zeros, ones, or a part of the same file."""
    start, end = span(raw, rng)
    other = int(rng.integers(len(raw) - (end - start) + 1))
    kinds = (bytes(end - start), b"\xff" * (end - start), raw[other : other + end - start])
    return raw[:start] + kinds[rng.integers(3)] + raw[end:]


def exchange(raw, _, rng):
    (a, b), (c, d) = sorted([span(raw, rng, len(raw) // 2), span(raw, rng, len(raw) // 2)])
    c, d = max(b, c), max(b, d)
    return raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def splice(raw, other, rng):
    """Parts of two checkpoints of one optimizer, both of which are whole."""
    start, end = span(raw, rng)
    size, size_other = (8 + int.from_bytes(r[:8], "little") for r in (raw, other))
    ways = (
        raw[:start] + other[start:end] + raw[end:],
        raw[:start] + other[start:],
        raw[:size] + other[size_other:],
        raw[: size + 100] + other[size_other + 100 :],
        raw + other,
    )
    return ways[rng.integers(len(ways))]


def header_length(raw, _, rng):
    size = int.from_bytes(raw[:8], "little")
    lengths = (
        size + int(rng.integers(-9, 10)),
        int(rng.integers(len(raw))),
        2 ** int(rng.integers(64)),
        2 ** int(rng.integers(64)) - 1,
        int(rng.integers(2**63)),
        len(raw) - 8,
        size << 8,
        size >> 1,
    )
    return (lengths[rng.integers(len(lengths))] % 2**64).to_bytes(8, "little") + raw[8:]


def tensor_bytes(raw, _, rng):
    """Change no more than the tensors' values."""
    size = 8 + int.from_bytes(raw[:8], "little")
    ways = (flip_bits, set_bytes, overwrite, exchange)
    return raw[:size] + ways[rng.integers(len(ways))](raw[size:], None, rng)


VALUES = (
    *(None, True, False, -1, 0, 1, 2**31, 2**62, 2**63, 2**64, 2**70, -(2**63), 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "1",
        "w",
        "\x00",
        "\ud800",
        "F32",
        "F16",
    ),
    *("inf", "repr", "../../etc/passwd", [], [0], [0, 2**62], [2**32, 2**32], [1] * 70, {}),
    *({"name": "cosine", "num_steps": 5}, {"repr": "x"}, [[]], {"": None}, "9" * 300, 10**400),
)


def structure(raw, _, rng):
    """Change the header's JSON, or the description's, its checksums staying as they are."""
    return _structure(raw, rng, forge=False)


def forged(raw, _, rng):
    """Change them, and often the tensors too, and make all checksums right again."""
    return _structure(raw, rng, forge=True)


def _structure(raw, rng, *, forge):
    entries, metadata, said, data = parts(raw)
    tree = {"entries": entries, "metadata": metadata, "said": said}
    if forge and rng.random() < 0.5:
        data = tensor_bytes(file("{}", data), None, rng)[10:]
    for _ in range(rng.integers(1, 3)):
        ways = [path for path in nodes(tree) if len(path) > 1]
        path = ways[rng.integers(len(ways))]
        inner, key = at(tree, path[:-1]), path[-1]
        other = at(tree, ways[rng.integers(len(ways))])
        match rng.integers(6):
            case 0:
                inner[key] = copy.deepcopy(other)
            case 1:
                del inner[key]
            case 2 if isinstance(inner, dict):
                name = VALUES[rng.integers(len(VALUES))]
                inner[name if isinstance(name, str) else f"{key}x"] = inner.pop(key)
            case 3 if isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
                inner[key] += int(rng.integers(-2, 3))
            case 4 if isinstance(inner, list):
                inner.insert(key, copy.deepcopy(other))
            case _:
                inner[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    entries, metadata, said = tree["entries"], tree["metadata"], tree["said"]
    if forge and isinstance(said, dict) and rng.random() < 0.8:
        with contextlib.suppress(Exception):
            said["crc32"] = {
                name: file_format.zlib.crc32(data[slice(*entry["data_offsets"])])
                for name, entry in entries.items()
            }
    if rng.random() < 0.1:  # a key twice
        said = json.dumps(said)
        key = f'"{rng.choice(["steps", "groups", "lr", "extra", "params"])}":'
        said = said.replace(key, f"{key} {json.dumps(VALUES[rng.integers(len(VALUES))])}, {key}")
    # Not much is left to say of them where these are no mappings.
    entries = entries if isinstance(entries, dict) else {"": entries}
    metadata = metadata if isinstance(metadata, dict) else {"": metadata}
    return whole(entries, metadata, said, data, forge=forge)


def rewrite(raw, _, rng):
    """Say the same in other words: spaces, escapes, order."""
    size = 8 + int.from_bytes(raw[:8], "little")
    header = list(json.loads(raw[8:size]).items())
    rng.shuffle(header)
    text = json.dumps(
        dict(header), ensure_ascii=bool(rng.integers(2)), indent=int(rng.integers(3))
    )
    return file(text + " " * rng.integers(9), raw[size:])


def several(raw, other, rng):
    for _ in range(rng.integers(2, 5)):
        raw = SIMPLE[rng.integers(len(SIMPLE))](raw, other, rng)
        if len(raw) < 9:
            break
    return raw


SIMPLE = (flip_bits, set_bytes, truncate, extend, cut, double, overwrite, exchange)
MUTATORS = (
    *SIMPLE,
    *(set_characters, splice, header_length, tensor_bytes, structure, rewrite, several),
    *(forged, forged, forged, forged, forged),
)


# What runs in a process of its own.


class Judge:
    """An optimizer that files are loaded into, in a state that none of them holds."""

    def __init__(self, folder):
        self.path = folder / "file.safetensors"
        self.count = folder / "count"
        self.saved = []
        for seed in (3, 5):
            opt, params, extra = make(seed)
            fastadam.save(self.path, opt, extra=extra)
            self.saved.append((picture(opt, params), self.path.read_bytes()))
        self.renew()
        self.outcomes = {"refused": 0, "loaded": 0, "forged": 0}
        faulthandler.enable()
        self.limit_memory()

    def renew(self):
        self.opt, self.params, _ = make(2)
        self.before = picture(self.opt, self.params)

    def limit_memory(self):
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            used = pages * os.sysconf("SC_PAGE_SIZE")
            limit = used + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def judge(self, label, raw, *, forged=False):
        """Load bytes, or what is at the path, and return the message if they are refused."""
        self.count.write_text(label)
        if raw is not None:
            self.path.write_bytes(raw)
        if hasattr(signal, "alarm"):
            signal.alarm(SECONDS)  # ends the process
        said = None
        with contextlib.suppress(fastadam.CheckpointError):
            said = fastadam.checkpoint.inspect(self.path)
        found, message = None, ""
        try:
            found = fastadam.load(self.path, self.opt)
        except fastadam.CheckpointError as error:
            message = str(error)
        if found is None:
            assert str(self.path) in message, label
            assert picture(self.opt, self.params) == self.before, label
            self.outcomes["refused"] += 1
            return message
        assert said == found, label
        if forged:
            self.check_forged(label, found)
            self.outcomes["forged"] += 1
        else:
            assert picture(self.opt, self.params) in [saved for saved, _ in self.saved], label
            assert found.extra == EXTRA, label
            self.outcomes["loaded"] += 1
        self.renew()
        return None

    def check_forged(self, label, found):
        """What a consistent file says, the optimizer must be, and be able to go on from."""
        entries, _, said, data = parts(self.path.read_bytes())
        opt, state = self.opt, self.opt.state
        assert found.step_count == opt.step_count == said["step_count"], label
        assert [s["step"] for s in state.values()] == said["steps"], label
        params = dict(zip(state, self.params, strict=True))
        for name, entry in entries.items():
            kind, _, param = name.partition("/")
            array = params[param] if kind == "param" else state[param][kind]
            assert array.tobytes() == data[slice(*entry["data_offsets"])], (label, name)
        for own, group in zip(opt.param_groups, said["groups"], strict=True):
            for option in ("lr", "eps", "weight_decay", "decoupled_weight_decay", "maximize"):
                assert own[option] == group[option], (label, option)
            assert list(own["betas"]) == group["betas"], label
        assert opt.schedule == found.schedule, label
        grads = [{k: np.ones_like(params[k]) for k in g["params"]} for g in found.param_groups]
        with np.errstate(all="ignore"), contextlib.suppress(ValueError):  # a rate too large
            opt.step(grads)


def run_mutations(folder, start, stop):
    judge = Judge(folder)
    original, other = (raw for _, raw in judge.saved)
    assert judge.judge("original", original) is None
    assert judge.judge("other", other) is None
    loaded = set()
    for number in range(int(start), int(stop)):
        mutator = MUTATORS[number % len(MUTATORS)]
        raw = mutator(original, other, np.random.default_rng([SEED, number]))
        label = f"{number} {mutator.__name__}"
        if judge.judge(label, raw, forged=mutator is forged) is None:
            loaded.add(mutator.__name__)
    return {**judge.outcomes, "loaded_of": sorted(loaded)}


# Every node of the description in turn is each of these.
WRONG = (
    *(None, True, -1, 0, 2**62, 2**64, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x"),
    *([], [1], [None], {}, {"x": 1}, 10**400, "9" * 5000, "\ud800", {"name": "constant"}),
)


def some(values, path):
    """Return a part of the values and their places, another for each path."""
    return list(enumerate(values))[len(str(path)) % EVERY :: EVERY]


def run_fields(folder):
    """Load files of which one field is wrong, as their checksums do not tell."""
    judge = Judge(folder)
    entries, metadata, said, data = parts(judge.saved[0][1])
    for path in nodes(said):
        if path[:1] == ("extra",):
            continue
        for place, wrong in some(WRONG, path):
            forged = whole(entries, metadata, put(said, path, wrong), data)
            judge.judge(f"{path} {place}", forged, forged=True)
        if path:
            gone = copy.deepcopy(said)
            del at(gone, path[:-1])[path[-1]]
            message = judge.judge(
                f"{path} gone", whole(entries, metadata, gone, data), forged=True
            )
            assert message or "schedule" in path, path
    for tree in (entries, metadata):
        for path in nodes(tree):
            for place, wrong in some(WRONG, path):
                made = put(tree, path, wrong)
                if not isinstance(made, dict):
                    continue
                raw = (
                    whole(made, metadata, None, data)
                    if tree is entries
                    else whole(entries, made, None, data)
                )
                judge.judge(f"header {path} {place}", raw, forged=True)
    return judge.outcomes


def handmade(original):
    """Yield names, files, and what the message must match."""
    entries, metadata, said, data = parts(original)
    size = int.from_bytes(original[:8], "little")

    def changed(**fields):
        return whole(entries, metadata, {**said, **fields}, data)

    def tensors(more, data=data):
        return whole({**entries, **more}, metadata, said, data)

    def entry(dtype, shape, start, end):
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    yield "empty", b"", "header too small"
    yield "one byte", b"\x00", "header too small"
    yield "text", b"This is a plain text file, and a long one." * 50, "no checkpoint, or damaged"
    yield "pickle", b"\x80\x04\x95" + bytes(2000), "no checkpoint, or damaged"
    yield "zip", b"PK\x03\x04" + bytes(2000), "no checkpoint, or damaged"
    for length in (2**63, 2**64 - 1, 2**63 - 1, 100_000_001, 100_000_000, 10**10):
        yield f"header of {length}", length.to_bytes(8, "little") + original[8:], "header"
    for length in (0, 1, 7, 8, size - 1, size + 1, len(original), len(original) - 8):
        raw = length.to_bytes(8, "little") + original[8:]
        yield f"header of {length}", raw, "no checkpoint, or damaged"
    yield "header and no more", original[: 8 + size], "no checkpoint, or damaged"

    for text in ("", "{", "[]", "null", "3", '"x"', "{}{}", '{"a":}', "\xff\xfe", "{'a': 1}"):
        yield f"header {text}", file(text), "no checkpoint"
    yield "no tensors", file("{}"), "is no checkpoint of fastadam's"
    yield "brackets", file("[" * 10**6), "no checkpoint, or damaged"
    yield "braces", file('{"a":' * 10**5), "no checkpoint, or damaged"
    yield "deep metadata", file({"__metadata__": json.loads("[" * 100 + "]" * 100)}), "damaged"
    yield "metadata of numbers", file({"__metadata__": {"fastadam_format": 1}}), "damaged"
    yield "metadata alone", file({"__metadata__": {"fastadam_format": "1"}}), "damaged"
    yield "no description", whole(entries, {"fastadam_format": "1"}, None, data), "damaged"

    for name, text in {
        "brackets": "[" * 10**6,
        "closed brackets": "[" * 10**6 + "]" * 10**6,
        "braces": '{"a":' * 10**6,
        "closed braces": '{"a":' * 10**5 + "1" + "}" * 10**5,
        "no JSON": "x",
        "nothing": "",
        "digits": "9" * 10**5,
        "exponent": "1e999999999",
        "list": "[]",
        "null": "null",
        "surrogate": '"\\ud800"',
        "NaN": "NaN",
    }.items():
        yield f"description {name}", whole(entries, metadata, text, data), "or damaged"
    for field in ("steps", "step_count", "version", "params", "groups", "schedule", "crc32"):
        text = json.dumps({**said, field: "@"})
        for name, value in {
            "digits": "9" * 10**5,
            "4300 digits": "9" * 4300,
            "brackets": "[" * 10**5 + "]" * 10**5,
            "900 brackets": "[" * 900 + "]" * 900,
            "300 braces": '{"a":' * 300 + "1" + "}" * 300,
        }.items():
            if field == "version" and name not in ("digits", "brackets"):
                continue  # it may be anything
            raw = whole(entries, metadata, text.replace('"@"', value), data)
            yield f"{field} {name}", raw, "or damaged"
    text = json.dumps({**said, "extra": "@"})
    for name, value in (("digits", "9" * 10**5), ("brackets", "[" * 10**6 + "]" * 10**6)):
        raw = whole(entries, metadata, text.replace('"@"', value), data)
        yield f"extra {name}", raw, "or damaged"

    for number in ("2", "9" * 300, "10000000000000000000"):
        stale = whole(entries, {**metadata, "fastadam_format": number}, None, data, forge=False)
        yield f"format {number:.20}", stale, "is of format .*, and this fastadam reads up to 1"
    for number in ("-1", "0", "1.0", " 1", "1 ", "01", "", "x", "\u0661", "\u00b2", "1e0", "\x00"):
        for forge in (True, False):
            raw = whole(entries, {**metadata, "fastadam_format": number}, None, data, forge=forge)
            wanted = "must be of a format up to 1, got" if forge else "header does not match"
            yield f"format {number!r} {forge}", raw, wanted

    yield "steps too few", changed(steps=said["steps"][:-1]), "or damaged"
    yield "steps too many", changed(steps=[*said["steps"], 1]), "or damaged"
    yield "twice a name", changed(params=["w", "w", "ö/w", "none"]), "or damaged"
    yield "other names", changed(params=["w", "f", "ö/w", "x"]), "or damaged"
    yield "a group less", changed(groups=said["groups"][:1]), "or damaged"
    yield (
        "groups joined",
        changed(groups=[{**said["groups"][0], "params": said["params"]}]),
        "param_groups has 1 groups, not 2",
    )
    for schedule in (
        *({"name": name} for name in ("Schedule", "Base", "__class__", "eval", "", None, [], {})),
        *({"name": "cosine"}, {"num_steps": 3}, {"name": "cosine", "num_steps": "x"}),
        *({"name": "cosine", "num_steps": 3, "self": 1}, {"name": "chain"}),
        *({"name": "chain", "parts": {}, "last": None}, {"name": "warmup", "schedule": "cosine"}),
        *({"name": "warmup", "schedule": None, "steps": 1}, "cosine", ["cosine"], True, 0),
    ):
        yield f"schedule {schedule}", changed(schedule=schedule), "or damaged"
    for depth in (10**3, 10**4, 10**5):
        deep = (
            '{"name":"warmup","steps":1,"schedule":' * depth + '{"name":"constant"}' + "}" * depth
        )
        raw = whole(entries, metadata, json.dumps({**said, "schedule": "@"}), data)
        text = json.dumps({**said, "schedule": "@"}).replace('"@"', deep)
        yield f"schedules {depth} deep", whole(entries, metadata, text, data), "or damaged"

    end = len(data)
    for name in (
        *("../../etc/passwd", "/abs", "exp_avg/", "exp_avg", "", "/", "//", "\x00", "exp_avg/x"),
        *(
            "exp_avg/../w",
            "momentum/w",
            "param/w/",
            "Param/w",
            "param//w",
            "PARAM/w",
            "w",
            "step/w",
        ),
    ):
        more = tensors({name: entry("F32", [0], end, end)})
        yield f"tensor {name!r}", more, "or damaged"
        yield (
            f"sized {name!r}",
            tensors({name: entry("F32", [1], end, end + 4)}, data + bytes(4)),
            ("or damaged"),
        )
        with_checksum = {**said, "crc32": {**said["crc32"], name: 0}}
        more = whole({**entries, name: entry("F32", [0], end, end)}, metadata, with_checksum, data)
        yield f"whole {name!r}", more, "is no tensor of a parameter"
    for name in ("\ud800", "exp_avg/\udfff"):
        yield f"tensor {name!r}", tensors({name: entry("F32", [0], end, end)}), "or damaged"

    gigabytes = 10 * 2**30
    for dtype, shape, length in (
        ("F32", [gigabytes // 4], gigabytes),
        ("F64", [2**17, 10 * 2**10], gigabytes),
        ("F64", [2**61 - 1], 2**64 - 8),
        ("F32", [2**32, 2**32], 0),
        ("F32", [2**62, 4], 2**64),
        ("F32", [2**64], 0),
        ("F32", [-1], 4),
        ("F32", [1.0], 4),
    ):
        yield (
            f"declared {shape}",
            tensors({"exp_avg/w": entry(dtype, shape, end, end + length)}),
            ("no checkpoint, or damaged"),
        )
        alone = {"exp_avg/w": entry(dtype, shape, 0, length)}
        yield f"alone {shape}", whole(alone, metadata, said, b""), "no checkpoint, or damaged"
    for shape in ([0, 2**62], [2**62, 0], [2**63, 0], [0, 2**31, 2**31, 2**31], [0] * 70):
        absurd = whole(
            {**entries, "param/none": entry("F64", shape, *entries["param/none"]["data_offsets"])},
            metadata,
            said,
            data,
        )
        yield f"zeros {shape}", absurd, "no checkpoint, or damaged|must fit the optimizer"
    start, stop = entries["param/w"]["data_offsets"]
    for shape in ([1] * 70 + [12], [1] * 33 + [12], [12], [4, 3], [3, 4, 1], [12, 1, 1]):
        reshaped = {**entries, "param/w": entry("F32", shape, start, stop)}
        yield f"shape {shape}", whole(reshaped, metadata, said, data), "damaged|must fit"
    for dtype in ("BF16", "F8_E4M3", "I64", "F16", "BOOL", "C64", "F4", "f32", "", "F32 "):
        size = {"BF16": 2, "F16": 2, "I64": 8, "C64": 8, "F32 ": 4}.get(dtype, 1)
        other = {**entries, "param/w": entry(dtype, [(stop - start) // size], start, stop)}
        yield f"dtype {dtype}", whole(other, metadata, said, data), "no checkpoint, or damaged"
    swapped = {**entries, "param/w": entry("F64", [3, 2], start, stop)}
    yield "dtype F64", whole(swapped, metadata, said, data), "must fit the optimizer"
    for first, last in (
        (start, stop + 4),
        (start - 4, stop),
        (start + 4, stop + 4),
        (stop, start),
    ):
        moved = {**entries, "param/w": entry("F32", [3, 4], first, last)}
        yield f"from {first} to {last}", whole(moved, metadata, said, data), "or damaged"
    overlap = {**entries, "param/w": {**entries["exp_avg/w"]}}
    yield "overlapping", whole(overlap, metadata, said, data), "or damaged"
    yield "a gap at the end", whole(entries, metadata, said, data + bytes(8)), "or damaged"
    many = {f"exp_avg/{number}": entry("F32", [0], end, end) for number in range(4 * MANY)}
    yield "many tensors", tensors(many), "or damaged"
    names = [f"{number}" for number in range(MANY)]
    kinds = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    many = {f"{kind}/{name}": entry("F32", [0], 0, 0) for name in names for kind in kinds}
    long = {
        **said,
        "params": names,
        "steps": [1] * len(names),
        "groups": [{**said["groups"][0], "params": names}],
        "crc32": dict.fromkeys(many, 0),
    }
    yield "many that are consistent", whole(many, metadata, long, b""), "must fit the optimizer"


def run_handmade(folder):
    """Return for each file what must match its message, and its message."""
    judge = Judge(folder)
    messages = {
        name: (wanted, judge.judge(name, raw, forged=True))
        for name, raw, wanted in handmade(judge.saved[0][1])
    }
    if hasattr(os, "truncate"):  # a sparse file, of which nothing takes space
        judge.path.write_bytes(judge.saved[0][1])
        os.truncate(judge.path, 2**28)
        messages["sparse"] = ("or damaged", judge.judge("sparse", None))
    return messages


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Start all at once."""
    started = {}
    for name, *arguments in (("mutations", "0", str(MUTATIONS)), ("fields",), ("handmade",)):
        folder = tmp_path_factory.mktemp(name)
        command = [sys.executable, __file__, name, folder, *arguments]
        # To files: a pipe would be full before it is read.
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            started[name] = folder, subprocess.Popen(command, stdout=out, stderr=err)
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def result(batch):
    folder, process = batch
    process.wait(timeout=280)
    last = folder / "count"
    label = last.read_text() if last.exists() else "nothing"
    errors = (folder / "err").read_text()
    assert process.returncode == 0, f"{process.returncode} at {label}: {errors}"
    return json.loads((folder / "out").read_text())


# The tests.


def test_mutated_files(batches):
    done = result(batches["mutations"])
    # The two that all are made from were loaded too.
    assert done["refused"] + done["loaded"] + done["forged"] == MUTATIONS + 2
    assert done["refused"] > MUTATIONS // 2
    # Some say the same in other words, and some forged ones are consistent.
    assert "rewrite" in done["loaded_of"]
    assert done["forged"] > MUTATIONS // 150


def test_each_field_wrong(batches):
    assert result(batches["fields"])["refused"] > 4000 // EVERY


def test_absurd_files(batches, subtests):
    messages = result(batches["handmade"])
    assert len(messages) > 200
    for name, (wanted, message) in messages.items():
        with subtests.test(name):
            assert message is not None
            assert re.search(wanted, message), message


@pytest.fixture
def saved(tmp_path):
    opt, params, extra = make(3)
    path = tmp_path / "run.safetensors"
    fastadam.save(path, opt, extra=extra)
    return path, opt, params


def test_a_file_of_safetensors_that_is_no_checkpoint(tmp_path):
    from safetensors.numpy import save_file

    path, (opt, params, _) = tmp_path / "model.safetensors", make(2)
    for metadata in (None, {}, {"format": "pt"}):
        save_file({"param/w": np.zeros(3)}, path, metadata)
        before = picture(opt, params)
        with pytest.raises(fastadam.CheckpointError, match="is no checkpoint of fastadam's"):
            fastadam.load(path, opt)
        assert picture(opt, params) == before


def test_a_tensor_that_is_called_as_an_error_of_the_system(tmp_path):
    path = tmp_path / "run.safetensors"
    for name, dtype in (("I/O error: (os error 5)", "F32"), ("a", "I/O error: (os error 5)")):
        header = json.dumps({name: {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}})
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"abcd")
        with pytest.raises(fastadam.CheckpointError, match="no checkpoint, or damaged"):
            fastadam.checkpoint.inspect(path)


def test_every_cut_is_refused(saved):
    """Whatever the length: no part of a file is a file."""
    path, opt, params = saved
    raw, before = path.read_bytes(), picture(opt, params)
    for length in [*range(0, len(raw), 1 if FULL else 13), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(fastadam.CheckpointError):
            fastadam.load(path, opt)
    assert picture(opt, params) == before


def test_every_bit_counts(saved):
    """Each byte of the file, with one of its bits flipped: refused, or it means the same."""
    path, opt, params = saved
    raw, before = path.read_bytes(), picture(opt, params)
    same = 0
    for place in range(0, len(raw), 1 if FULL else 9):
        turned = bytearray(raw)
        turned[place] ^= 1 << place % 8
        path.write_bytes(turned)
        try:
            found = fastadam.load(path, opt)
        except fastadam.CheckpointError:
            continue
        same += 1
        assert found.extra == EXTRA
        assert picture(opt, params) == before
    assert picture(opt, params) == before
    assert same < 40  # spaces after the header, capital letters in escapes


def test_other_ways_of_loading_refuse_too(saved):
    """Also where less of the file is asked for, what is wrong with the rest is an error."""
    path, opt, params = saved
    entries, metadata, said, data = parts(path.read_bytes())
    opt.lr = 7.0
    before = picture(opt, params)
    for bad in (
        whole(entries, metadata, {**said, "groups": 3}, data),
        whole(entries, metadata, said, data, forge=False)[:-1],
        whole(entries, metadata, {**said, "steps": [2**62] * 4}, data),
    ):
        path.write_bytes(bad)
        for ways in (
            {"params": False},
            {"hyperparameters": False},
            {"partial": True},
            {"rename": {"w": "x"}},
            {"rename": lambda name: name},
        ):
            with pytest.raises(fastadam.CheckpointError):
                fastadam.load(path, opt, **ways)
            assert picture(opt, params) == before


if __name__ == "__main__":
    name, place, *rest = sys.argv[1:]
    print(json.dumps(globals()[f"run_{name}"](Path(place), *rest)))
