"""How fast: calls timed side by side, interleaved, in one process; the records of it.

Every repetition times each variant once, in turn, so drift of the machine hits all alike;
a ratio is the median of the repetitions' own ratios.
"""

import copy
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError, home
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.provenance import commit, versions
from moebert_lib.method.routing import balance_loss, random_table
from moebert_lib.model.modeling import MoEBertConfig, MoEBertForSequenceClassification
from moebert_lib.model.moe_layer import MoEOutput, moe_layers
from moebert_lib.store.committed_results import named

#: Rounds where none are asked for: as many as fit in so many seconds, within these bounds.
SECONDS, LEAST, MOST = 60, 5, 21

#: A wish of :func:`judge`: setting, variant, what it is compared with, how many times as fast.
Wish = tuple[str, str, str, float | None]


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int | None = None,
    look: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Seconds of each call in every repetition, after one untimed round.

    Args:
        calls: What to time, by variant. Gradients are as the calls have them.
        repeats: Timed rounds; none: as many as fit in a minute, 5 to 21.
        look: Is given what each call returned in the untimed round, and raises if it is wrong.

    Returns:
        Columns ``variant``, ``repeat``, ``seconds``.
    """
    first = {variant: call() for variant, call in calls.items()}
    _wait()
    if look:
        look(first)
    del first
    rows: list[tuple[str, int, float]] = []
    repeat, begin = 0, time.perf_counter()
    while repeat < (repeats or _rounds(repeat, time.perf_counter() - begin)):
        for variant, call in calls.items():
            start = time.perf_counter()
            call()
            _wait()
            rows.append((variant, repeat, time.perf_counter() - start))
        repeat += 1
    return pd.DataFrame(rows, columns=["variant", "repeat", "seconds"])


def _rounds(done: int, seconds: float) -> int:
    """How many rounds to make, by what those that are done took."""
    return LEAST if done < LEAST else min(MOST, done + (seconds < SECONDS))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(
    timings: pd.DataFrame,
    *,
    against: str = "dense",
    limits: Mapping[str, str] | None = None,
    units: int | Mapping[str, int] = 1,
) -> pd.DataFrame:
    """Per setting and variant: units a second, and speed relative to others, within rounds.

    Args:
        timings: Columns ``variant``, ``repeat``, ``seconds``, and ``setting`` where there are
            several.
        against: The variant whose speed is 1.
        limits: What each variant could reach at best, another variant; by default ``equal
            FLOPs`` for every other one.
        units: Units (examples) in one call, or those of each setting.

    Returns:
        One row a setting and variant: ``median_ms``, ``low_ms``, ``high_ms`` (quartiles),
        ``per_second``, ``ratio`` with its quartiles ``ratio_low``, ``ratio_high``, the median
        of the ratios within each repetition, and likewise ``of_limit``, NaN without a limit.
    """
    rows = []
    settings = timings.get("setting", pd.Series("", index=timings.index))
    for setting, timed in timings.groupby(settings, sort=False):
        wide = timed.pivot(index="repeat", columns="variant", values="seconds")
        per_call = units if isinstance(units, int) else units[str(setting)]
        for variant in timed["variant"].unique():
            limit = LIMIT if limits is None else limits.get(variant)
            low, middle, high = 1000 * wide[variant].quantile([0.25, 0.5, 0.75])
            rows.append(
                {
                    "setting": setting,
                    "variant": variant,
                    "median_ms": middle,
                    "low_ms": low,
                    "high_ms": high,
                    "per_second": per_call / (middle / 1000),
                    **_named("ratio", paired(wide, variant, against)),
                    **_named("of_limit", paired(wide, variant, limit)),
                }
            )
    table = pd.DataFrame(rows)
    return table if "setting" in timings else table.drop(columns="setting")


def paired(wide: pd.DataFrame, variant: str, against: str | None) -> tuple[float, float, float]:
    """Quartile, median and quartile of how many times as fast, from rounds by variants."""
    if against not in wide:
        return (np.nan,) * 3
    return tuple((wide[against] / wide[variant]).quantile([0.25, 0.5, 0.75]))


def _named(name: str, quartiles: tuple[float, float, float]) -> dict[str, float]:
    low, middle, high = quartiles
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def judge(timings: pd.DataFrame, wishes: Iterable[Wish]) -> list[dict[str, Any]]:
    """What was wanted beside what was reached, of the settings and variants that were timed.

    Args:
        timings: As for :func:`summary`, with ``setting``.
        wishes: ``(setting, variant, against, wanted)``; ``wanted`` is None where a number is
            reported without one.

    Returns:
        Of each: ``setting``, ``variant``, ``against``, ``wanted``, ``reached`` with quartiles
        ``low`` and ``high``, and ``met``, None without a wanted value.
    """
    rounds = {
        setting: timed.pivot(index="repeat", columns="variant", values="seconds")
        for setting, timed in timings.groupby("setting")
    }
    judged = []
    for setting, variant, against, wanted in wishes:
        if {variant, against} <= set(rounds.get(setting, ())):
            low, reached, high = map(float, paired(rounds[setting], variant, against))
            met = None if wanted is None else reached >= wanted
            judged.append(
                {
                    "setting": setting,
                    "variant": variant,
                    "against": against,
                    "wanted": wanted,
                    "reached": reached,
                    "low": low,
                    "high": high,
                    "met": met,
                }
            )
    return judged


def show(table: pd.DataFrame) -> None:
    """Print a summary within 120 columns: milliseconds, and ratios with their quartiles."""
    shown = {"setting": table["setting"]} if "setting" in table else {}
    shown |= {"": table["variant"], "ms": table["median_ms"].map(_digits)}
    shown |= {"quartiles": _range(table, "low_ms", "high_ms")}
    shown |= {"a second": table["per_second"].map(_digits)}
    for name, title in (("ratio", "speed"), ("of_limit", "of limit")):
        if table[name].notna().any():
            shown[title] = table[name].map(_digits)
            shown[f"quartiles of {name}"] = _range(table, f"{name}_low", f"{name}_high")
    printed = pd.DataFrame(shown)
    printed.columns = [name.partition(" of ")[0] for name in printed]
    print(printed.to_string(index=False), flush=True)


def say(targets: Iterable[dict[str, Any]]) -> None:
    """Print each target: what was reached, and whether that is what was wanted."""
    for row in targets:
        verdict = "" if row["met"] is None else f"; wanted {row['wanted']}: "
        verdict += {None: "", True: "met", False: "NOT met"}[row["met"]]
        print(
            f"{row['setting']}: {row['variant']} is {_digits(row['reached'])} times as fast as "
            f"{row['against']} ({_digits(row['low'])} to {_digits(row['high'])}){verdict}",
            flush=True,
        )


def _range(table: pd.DataFrame, low: str, high: str) -> list[str]:
    ends = zip(table[low].map(_digits), table[high].map(_digits), strict=True)
    return ["-".join(pair) if all(pair) else "" for pair in ends]


def _digits(value: float) -> str:
    """Three digits, or all before the point: 0.93, 13.2, 1,348; nothing for NaN."""
    if np.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def gather(measured: Iterable[pd.DataFrame]) -> tuple[pd.DataFrame, bool]:
    """Frames as they are measured, joined, until the last or Ctrl-C; and whether all came.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    frames: list[pd.DataFrame] = []
    complete = False
    try:
        for timings in measured:
            frames.append(timings)
        complete = True
    except KeyboardInterrupt:
        if not frames:
            raise
        print("\nstopped; what was finished is kept", flush=True)
    return pd.concat(frames, ignore_index=True), complete


def keep(
    what: str,
    timings: pd.DataFrame,
    table: pd.DataFrame,
    *,
    targets: Sequence[dict[str, Any]] = (),
    out: Path | None = None,
    **about: Any,
) -> Path:
    """Write a benchmark's record to ``runs/bench-<what>-<time>.json``, or ``out``; say where.

    Args:
        what: The benchmark's name.
        timings: Every timing.
        table: Their summary.
        targets: From :func:`judge`.
        out: The file to write instead.
        about: What else to record, as JSON values.
    """
    now = datetime.now(UTC)
    path = out or home() / "runs" / f"bench-{what}-{now:%Y%m%dT%H%M%S%f}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "what": what,
        "created": now.isoformat(timespec="seconds"),
        **about,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "summary": _rows(table),
        "timings": _rows(timings),
        "targets": list(targets),
    }
    write_bytes(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"kept in {path}")
    return path


def read(what: str) -> dict[str, Any]:
    """The newest whole record of this home, else the one committed in ``figures/bench``.

    Where figures are drawn from committed results, the committed one.

    Raises:
        UserError: there is none; the message says which command makes it.
    """
    own = sorted((home() / "runs").glob(f"bench-{what}-[0-9]*.json")) if not named() else []
    committed = home() / "figures" / "bench" / f"{what}.json"
    for path in [*reversed(own), committed]:
        record = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if record.get("complete", bool(record)):  # not what was stopped half-way
            return record
    raise UserError(f"nothing was measured that is called '{what}'; make it with {command(what)}")


def command(what: str) -> str:
    """What makes a record.

    Example:
        >>> command("inference-cuda")
        'moebert bench inference --device cuda'
    """
    name, _, device = what.partition("-")
    return f"moebert bench {name}" + (f" --device {device}" if device else "")


def frame(record: dict[str, Any], part: str) -> pd.DataFrame:
    """A record's ``summary``, ``timings``, ``targets`` or any other table, as it was."""
    rows = pd.DataFrame(record[part])
    return rows.astype({name: float for name in rows if rows[name].isna().all()})


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records", double_precision=15))


# What a benchmark ran on, and under which conditions.

#: Instructions that decide how fast matrices are multiplied, by /proc/cpuinfo's names.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "bf16")
BUSY = 0.5  # of a core: other work that a timing would show


def machine() -> dict[str, Any]:
    """CPU, cores, threads, instructions, memory, how torch was built, and the GPU or "none"."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    libraries = {
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {
        **provenance.machine(),
        "instructions": _instructions(),
        "ram_gb": _ram(),
        "torch_build": libraries,
        "gpu": gpu,
    }


def prepare() -> dict[str, Any]:
    """Called first by every benchmark: has memory kept, and says whether others are at work.

    Returns:
        ``load``, the average over the last minute for each core, None where the system does
        not say; ``memory_kept``, see :func:`keep_memory`; and ``malloc``, settings of the
        allocator that the process was started with.
    """
    cores = provenance.cores()
    load = os.getloadavg()[0] / cores if hasattr(os, "getloadavg") else None
    if load is not None and load > BUSY:
        print(f"timed beside other work: load {load * cores:.1f} on {cores} cores", flush=True)
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return {"load": load, "memory_kept": keep_memory(), "malloc": malloc}


def keep_memory() -> bool:
    """Have glibc keep freed memory for the next call; whether that could be done.

    Else large buffers go back to the system after each layer, and are mapped and zeroed anew:
    a cost of the allocator, not of the model. It is what MALLOC_MMAP_MAX_=0 and
    MALLOC_TRIM_THRESHOLD_=100000000000 do before a process starts.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))


def _instructions() -> list[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    lines = (line.partition(":") for line in info.read_text().splitlines())
    flags = next((value.split() for name, _, value in lines if name.strip() == "flags"), [])
    return [name for name in INSTRUCTIONS if name in flags]


def _ram() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


# What is timed: models of random weights, and sentences like those of real tasks.

#: BERT-base, the model of Fig. 4.
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
#: Two small layers: for tests.
TINY_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}
VOCAB = BertConfig().vocab_size
#: Names that are asked for elsewhere too.
LIMIT, RELEASE = "equal FLOPs", "release style"


def models(
    shape: dict[str, int], *, seed: int = 0, only: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """The variants of Fig. 4, the limit and the release's layers; eval mode, random weights.

    ``dense`` is BERT; ``half depth`` is DistilBERT (every other layer gone); ``equal FLOPs`` is
    BERT with an FFN as narrow as one expert, which no MoE of one active expert can beat by
    routing alone; the ``moebert`` ones have 4 experts of a quarter, with a random hash table in
    each layer or with a gate; ``release style`` is a copy of the first, computed as released.

    Args:
        shape: BERT's sizes.
        seed: Of the weights.
        only: Names of those to build; all by default.
    """
    torch.manual_seed(seed)
    width = shape["intermediate_size"]
    narrow = {**shape, "intermediate_size": width // 4}
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: _bert(shape),
        LIMIT: lambda: _bert(narrow),
        "half depth": lambda: _distilbert(shape),
        "moebert hash-random": lambda: moebert(shape),
        "moebert gate-sentence": lambda: moebert(shape, routing="gate-sentence"),
    }
    built = {n: _shaken(make()) for n, make in makers.items() if not only or n in only}
    if not only or RELEASE in only:
        built[RELEASE] = as_released(built.get("moebert hash-random") or _shaken(moebert(shape)))
    return built


@torch.no_grad()
def _shaken(model: nn.Module) -> nn.Module:
    """In eval mode, with LayerNorms and biases that differ: else a mix-up would not show."""
    for name, values in model.named_parameters():
        if values.dim() == 1 or "LayerNorm" in name or "bias" in name:
            values.add_(0.1 * torch.randn_like(values))
    return model.eval()


def _bert(shape: dict[str, int]) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**shape))


def _distilbert(shape: dict[str, int]) -> nn.Module:
    config = DistilBertConfig(
        vocab_size=shape.get("vocab_size", VOCAB),
        dim=shape["hidden_size"],
        n_layers=max(shape["num_hidden_layers"] // 2, 1),
        n_heads=shape["num_attention_heads"],
        hidden_dim=shape["intermediate_size"],
    )
    return DistilBertForSequenceClassification(config)


def moebert(
    shape: dict[str, int],
    *,
    routing: str = "hash-random",
    n_experts: int = 4,
    expert_size: int | None = None,
) -> MoEBertForSequenceClassification:
    """A MoEBERT of random weights; its experts share the FFN's width unless a size is given."""
    size = expert_size or shape["intermediate_size"] // n_experts
    config = MoEBertConfig(
        **shape, n_experts=n_experts, expert_size=size, n_shared=0, routing=routing
    )
    model = MoEBertForSequenceClassification(config).eval()
    if routing == "hash-random":
        for index, layer in enumerate(model.bert.encoder.layer):
            table = random_table(config.vocab_size, n_experts, seed=index)
            layer.output.router.tid2eid.copy_(table.view(-1, 1))
    return model


def zipf(vocab: int, *, n: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """``n`` sentences of ``length`` tokens, as unevenly frequent as words: ``input_ids``.

    The r-th token of the vocabulary comes with a frequency proportional to 1/r (Zipf's law);
    token 0, BERT's padding, does not come.
    """
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocab, dtype=torch.float64)
    ids = torch.multinomial(frequencies, n * length, replacement=True, generator=generator)
    return {"input_ids": 1 + ids.view(n, length)}


def glue_like(vocab: int, *, n: int = 32, longest: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch with lengths spread like GLUE's: most are short, a few are long.

    Lengths are evenly spaced quantiles of a log-normal distribution: at 32 sentences their mean
    is 40 of the 128 tokens of the longest. Other lengths scale with ``longest``.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(n, longest)``.
    """
    ids = zipf(vocab, n=n, length=longest, seed=seed)["input_ids"]
    spread = 0.635
    steps = norm.ppf((np.arange(n) + 0.5) / n)
    lengths = np.round(longest * np.exp(spread * (steps - steps[-1]))).clip(min=3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(longest) < torch.tensor(lengths)[order, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


# MoE layers the way the release computes them: a yardstick for speed, with the same results.
# Every layer sorts the padded batch by expert, splits it, asks one module for each expert,
# stacks what they answer and sorts it back.


class ReleasedExpert(nn.Module):
    """One expert as a module of its own: two linear layers, dropout, residual, LayerNorm.

    Args:
        layer: The layer whose weights are copied.
        expert: Which of its experts.
    """

    def __init__(self, layer: MoEOutput, expert: int):
        super().__init__()
        own, norm = layer.experts, layer.LayerNorm
        K, D = own.up_proj[expert].shape
        self.fc1, self.fc2 = nn.Linear(D, K), nn.Linear(K, D)
        self.act, self.dropout, self.outside = own.act_fn, layer.dropout, layer.outside
        self.LayerNorm = nn.LayerNorm(D, eps=norm.eps)
        mine = expert if layer.per_expert else ...
        values = {
            self.fc1: (own.up_proj[expert], own.up_proj_bias[expert]),
            self.fc2: (own.down_proj[expert], own.down_proj_bias[expert]),
            self.LayerNorm: (norm.weight[mine], norm.bias[mine]),
        }
        for module, (weight, bias) in values.items():
            module.weight = nn.Parameter(weight.detach().clone())
            module.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Its tokens ``(n, D)``, and the gate's factors ``(n, 1)``; None for a hash."""
        y = self.dropout(self.fc2(self.act(self.fc1(x))))
        if weights is not None and not self.outside:
            y = y * weights
        y = self.LayerNorm(y + x)
        return y * weights if weights is not None and self.outside else y


class ReleasedFFN(nn.Module):
    """Stands where :class:`moe_layer.MoEOutput` stood, with its results.

    A sentence gate's tokens are sorted one by one here; the release sorts whole sentences.

    Args:
        layer: The layer that is copied; router and context are its own.
    """

    def __init__(self, layer: MoEOutput):
        super().__init__()
        self.router, self.context = layer.router, layer.context
        n_experts = layer.experts.num_experts
        self.experts = nn.ModuleList(ReleasedExpert(layer, expert) for expert in range(n_experts))

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Both arguments are the attention output, ``(B, T, D)``, and so is the result."""
        mask = self.context.mask
        route = self.router(hidden_states, self.context.input_ids, mask)
        chosen, x = route.experts[:, 0], input_tensor.flatten(0, 1)
        order = chosen.argsort(0)
        counts = F.one_hot(chosen, len(self.experts)).sum(0).tolist()
        weights: tuple = (None,) * len(counts)
        if route.probabilities is not None:
            self.context.balance_losses.append(balance_loss(route, mask))
            weights = route.weights[order].split(counts)
        pieces = zip(self.experts, x[order].split(counts), weights, strict=True)
        served = torch.vstack([expert(tokens, own) for expert, tokens, own in pieces])
        return served[order.argsort(0)].view_as(input_tensor)


def as_released(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a MoEBERT whose layers compute as the release's do.

    Args:
        model: A MoEBERT with any head, not accelerated. It stays as it is.

    Returns:
        The same kind of model with weights of its own: it answers and trains as ``model`` does.

    Raises:
        ValueError: there are no expert layers.
    """
    if not moe_layers(model):
        raise ValueError(
            f"as_released takes a MoEBERT, not a {type(model).__name__} without experts"
        )
    model = copy.deepcopy(model)
    for layer in model.base_model.encoder.layer:
        layer.output = ReleasedFFN(layer.output).train(layer.training)
    return model
