"""The runs that notebooks ask for, declared once: a notebook runs them, a plan lists them.

Every point is a complete, validated experiment. Points that several notebooks ask for are
equal, so the store runs them once.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from moebert_lib.config.paper_numbers import TABLE7
from moebert_lib.config.presets import LARGE
from moebert_lib.config.settings import PaperRouting, Settings
from moebert_lib.data.tasks import TASKS

Grid = dict[str, list[Settings]]

ROUTINGS: tuple[str, ...] = get_args(PaperRouting)  # not routing.ROUTINGS: a plan needs no torch

#: Tasks of Table 3 (no distillation) and Table 4 (BERT-large).
TABLE3_TASKS = ("rte", "mnli", "squad_v2")
TABLE4_TASKS = ("rte", "mnli")

#: At the offline scales the tasks beside the main one learn from so much, and no more.
BRIEF = {"max_train_examples": 1000, "max_eval_examples": 200, "importance_examples": 400}

#: Ways to build experts: the paper's deal, the others of Fig. 3a, and MoEfication's groups.
CONSTRUCTIONS = {
    "deal": {},
    "random": {"ranking": "random"},
    "inverse": {"ranking": "inverse"},
    "k-means, weights": {"grouping": "kmeans-weights"},
    "k-means, activations": {"grouping": "kmeans-activations"},
    "co-activation": {"grouping": "coactivation"},
}

#: What a conversion does by default; the explorer's accuracies are of these.
PLAIN = ("routing", "ranking", "shared_neurons", "expert_layer_norm", "gate_scaling")

#: Of an expert, from nothing to nearly all: what notebooks 1 and 2 let experts share.
SHARED_PARTS = (0, 1 / 3, 2 / 3, 0.92)


def over_seeds(settings: Settings) -> list[Settings]:
    """The experiment with ``n_seeds`` seeds; a random deal is drawn anew for each."""
    seeds = [settings.seed + k for k in range(settings.n_seeds)]
    return [settings.but(seed=seed, split_seed=seed) for seed in seeds]


def ladder(settings: Settings) -> Grid:
    """Notebook 3: distilled, and trained as long on the task loss alone (Table 3)."""
    full = settings.distill if settings.distill != "none" else "all"
    return {which: over_seeds(settings.but(distill=which)) for which in (full, "none")}


def expert_sizes(settings: Settings, width: int, fraction: int) -> tuple[int, int]:
    """``(expert_size, n_shared)`` of experts a ``fraction``-th as wide as the layer (Fig. 2a).

    Two thirds are shared, whatever the default shares; the default's own width is the default.
    """
    size, shared = settings.sizes(width)
    narrow = width // fraction
    return (narrow, shared if narrow == size else -(-2 * narrow // 3))


def ablations(
    settings: Settings,
    width: int,
    *,
    fractions: Sequence[int] = (),
    numbers: Sequence[int] = (),
    thirds: Sequence[int] = (),
) -> Grid:
    """Notebook 4: Figures 2a-c and 3a-b, one setting changed at a time.

    Args:
        settings: The default configuration, part of every figure.
        width: Neurons of a dense FFN.
        fractions: Fig. 2a: ``width`` over the expert size; two thirds are shared throughout.
            None here and below: the paper's points at scale ``paper``, else fewer.
        numbers: Fig. 2b: experts; those that the layer cannot fill are left out.
        thirds: Fig. 2c: shared thirds of an expert.
    """
    whole = not settings.offline
    fractions = fractions or ((24, 8, 4, 2) if settings.scale == "paper" else (8, 4, 2))
    numbers = numbers or ((1, 2, 4, 8) if whole else (1, 4, 8))
    thirds = thirds or ((0, 1, 2, 3) if whole else (0, 2, 3))
    size, shared = settings.sizes(width)
    base = settings.but(expert_size=size, n_shared=shared)
    widths = [expert_sizes(settings, width, f) for f in fractions if width // f]
    fitting = [n for n in numbers if shared + n * (size - shared) <= width]
    varied = {
        "figure2a": [base.but(expert_size=k, n_shared=s) for k, s in widths],
        "figure2b": [base.but(n_experts=n) for n in fitting],
        "figure2c": [base.but(n_shared=size * t // 3) for t in thirds],
        "figure3a": [base.but(ranking=deal) for deal in ("importance", "random", "inverse")],
        "figure3b": [base.but(distill=which) for which in ("all", "skip", "last")],
    }
    return {
        name: [run for point in points for run in over_seeds(point)]
        for name, points in varied.items()
    }


def conversions(settings: Settings, width: int) -> list[Settings]:
    """Notebook 1: untrained conversions by importance, whose accuracy stands beside a deal.

    2, 4 and 8 experts that fill the layer between them, none to nearly all of each shared, and
    hash routing; two routing tables where notebook 2 asks for the same runs, with the settings'
    own number. A teacher's scores decide all else.

    Args:
        settings: The default configuration.
        width: Neurons of a dense FFN.
    """
    plain = {name: Settings.model_fields[name].default for name in PLAIN}
    fair = settings.but(teacher_seed=settings.dense_seed, **plain)
    return [
        fair.but(
            n_experts=n,
            expert_size=width // n,
            seed=settings.seed + k,
            n_shared=round(width // n * part),
        )
        for n in (2, 4, 8)
        if n <= width
        for part in SHARED_PARTS
        for k in range(1 + (n == settings.n_experts))
    ]


def constructions(settings: Settings, width: int) -> Grid:
    """Notebooks 2 and 4: every way to build experts, with shared neurons and without.

    The offline scales leave out those without, which take most of the time. Nor is there an
    inverse one: with none shared it deals the same hands, to experts of other numbers.

    Returns:
        Runs by ``"<way>"`` and ``"<way>, none shared"``.
    """
    size, shared = settings.sizes(width)
    grid = {}
    for n in (shared, 0)[: 1 if settings.offline or not shared else 2]:
        base = settings.but(expert_size=size, n_shared=n)
        for name, changes in CONSTRUCTIONS.items():
            if n or name != "inverse":
                grid[name + (", none shared" if not n else "")] = over_seeds(base.but(**changes))
    return grid


def deals_beside(names: Iterable[str]) -> dict[str, str]:
    """The deal that each of :func:`constructions` is held against: with as many shared."""
    return {n: "deal, none shared" if n.endswith("none shared") else "deal" for n in names}


def routers(settings: Settings) -> Grid:
    """Notebook 5: Figure 3c, and the token gate that the paper leaves out."""
    return {"figure3c": [run for r in ROUTINGS for run in over_seeds(settings.but(routing=r))]}


def beyond_routers(settings: Settings) -> Grid:
    """Notebook 5: a hash by clusters of words and two experts a token, beside their usual forms."""
    hashes, gate = ("hash-random", "hash-cluster"), settings.but(routing="gate-token")
    named = {routing: settings.but(routing=routing) for routing in hashes}
    named |= {f"gate-token, k = {k}": gate.but(gate_top_k=min(k, gate.n_experts)) for k in (1, 2)}
    return {name: over_seeds(point) for name, point in named.items()}


def tasks(settings: Settings, asked: Sequence[str] = ()) -> list[str]:
    """Tasks of notebook 6: the main one, and those asked for, or all that scale and data have."""
    if settings.data_dir:
        there = [name for name in TASKS if (Path(settings.data_dir) / name).is_dir()]
    elif settings.offline:
        there = [name for name, task in TASKS.items() if task.source == "built-in"]
    else:
        there = list(TABLE7)
    return list(dict.fromkeys([settings.task, *(asked or there)]))


def on_task(settings: Settings, task: str) -> Settings:
    """The experiment on another task: in full, or at the offline scales in brief.

    In brief there is less to learn from; students see as many examples as on the main task.
    """
    if task == settings.task:
        return settings
    built_in = TASKS[task].source == "built-in"
    other = settings.on(task, **({"data_dir": ""} if built_in else {}))
    if not settings.offline:
        return other
    less = {name: min(n, getattr(other, name) or n) for name, n in BRIEF.items()}
    again = (other.max_train_examples or 0) / less["max_train_examples"]
    return other.but(**less, epochs=other.epochs * max(again, 1.0))


def plain_training(settings: Settings) -> Grid:
    """Notebook 4: Table 3 by task, with and without distillation.

    At scale ``paper`` on the paper's three tasks, if the experiment is on one of them.
    """
    whole = settings.scale == "paper" and settings.task in TABLE3_TASKS
    names = [t for t in TABLE3_TASKS if t in tasks(settings)] if whole else [settings.task]
    both = [settings.but(distill=which) for which in ("all", "none")]
    return {
        name: [run for point in both for run in over_seeds(on_task(point, name))] for name in names
    }


def others(settings: Settings, asked: Sequence[str] = ()) -> list[Settings]:
    """Notebook 1: tasks to compare with; if none is asked for, the built-in ones offline."""
    built_in = [name for name, task in TASKS.items() if task.source == "built-in"]
    names = asked or (built_in if settings.offline else [])
    return [on_task(settings, name) for name in dict.fromkeys(names) if name != settings.task]


def results(settings: Settings, names: Sequence[str]) -> Grid:
    """Notebook 6: Tables 1 and 2 over tasks, Table 3's plain training, Table 4's BERT-large.

    Without distillation the paper has three tasks; scale ``small`` trains all of its own, since a
    claim over tasks needs them, and the offline scales only the main one. So it is with the deals
    of Figure 3a, which the paper has for one task.
    """
    base = settings.but(distill="all")
    each = {task: on_task(base, task) for task in names}
    paper = settings.scale == "paper"
    plain = [task for task in names if not paper or task in TABLE3_TASKS]
    plain = [settings.task] if settings.offline else plain
    large = [task for task in names if paper and task in TABLE4_TASKS]
    dealt = names if settings.scale == "small" else []
    return {
        "tables 1 and 2": [run for task in names for run in over_seeds(each[task])],
        "table3": [run for task in plain for run in over_seeds(each[task].but(distill="none"))],
        "deals": [
            run
            for task in dealt
            for deal in ("random", "inverse")
            for run in over_seeds(each[task].but(ranking=deal))
        ],
        "table4": [
            run
            for task in large
            for run in over_seeds(base.on(task, model=LARGE, expert_size=None))
        ],
    }


def claims(settings: Settings, names: Sequence[str], width: int, *, ablate: bool = True) -> Grid:
    """All that notebook 6 judges: :func:`results`, and on the main task notebooks 4's and 5's runs.

    Args:
        settings: The default configuration.
        names: Tasks.
        width: Neurons of a dense FFN.
        ablate: Whether to ask for the runs of notebooks 4 and 5.
    """
    more = ablations(settings, width) | routers(settings) if ablate else {}
    return results(settings, names) | more


def switches(settings: Settings) -> Grid:
    """Notebook 8: one switch at a time where paper and release differ, then all of them.

    Gates have a baseline of their own, since where they scale matters to nothing else. What a
    teacher with dropout says, or one whose padding counts, is never kept for other students.
    """
    base = settings.but(preset="paper")
    anew = base.but(cache_teacher=False)
    gate = base.but(routing="gate-token")
    points = {
        "paper": base,
        "importance on validation": base.but(importance_split="validation"),
        "teacher with dropout": anew.but(teacher_dropout=True),
        "shared neurons tied": base.but(shared_neurons="tied"),
        "one LayerNorm for all": base.but(expert_layer_norm="shared"),
        "padding counted": anew.but(padding_in_loss=True),
        "release": anew.but(preset="release"),
        "gate, inside": gate,
        "gate, outside": gate.but(gate_scaling="outside"),
    }
    return {name: over_seeds(point) for name, point in points.items()}


def asked(
    notebook: str, settings: Settings, parameters: Mapping[str, Any], width: int
) -> tuple[list[Settings], list[Settings]]:
    """What a notebook asks for: experiments whose neurons are scored, and students.

    Args:
        notebook: Its name, ``04_ablations``; others than the workbook's ask for nothing.
        settings: As the notebook makes them.
        parameters: Its own parameters by name.
        width: Neurons of a dense FFN.
    """
    sizes = {n: parameters[n] for n in ("fractions", "numbers", "thirds") if n in parameters}
    if notebook == "01_importance":
        return [settings, *others(settings, parameters.get("other_tasks", ()))], []
    if notebook == "02_experts":
        return [settings.but(teacher_seed=settings.dense_seed)], []
    grid: Grid = {}
    if notebook == "03_distillation":
        grid = ladder(settings)
    elif notebook == "04_ablations":
        grid = ablations(settings, width, **sizes) | plain_training(settings)
        grid |= constructions(settings, width)
    elif notebook == "05_routing":
        grid = routers(settings) | beyond_routers(settings)
    elif notebook == "06_results":
        names = tasks(settings, parameters.get("tasks", ()))
        grid = claims(settings, names, width, ablate=parameters.get("ablate", True))
    elif notebook.startswith("08_"):
        grid = switches(settings)
    return [], list(chain.from_iterable(grid.values()))
