"""The experiments that notebooks run, as named sets of settings.

A notebook takes its experiments from :func:`points` by name, and a plan lists them by asking the
same function. Each point is a complete, validated experiment. Points that several notebooks ask
for are equal, so the store runs them once. A plan reads this file, so it imports no torch.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import AfterValidator, Field, ValidationError, validate_call

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.paper_numbers import TABLE7
from moebert_lib.config.presets import LARGE
from moebert_lib.config.settings import PaperRouting, Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.method.encoder_layouts import shape

Grid = dict[str, list[Settings]]

ROUTINGS: tuple[str, ...] = get_args(PaperRouting)  # not routing.ROUTINGS, which needs torch

#: Tasks of Table 3 (no distillation) and Table 4 (BERT-large).
TABLE3_TASKS = ("rte", "mnli", "squad_v2")
TABLE4_TASKS = ("rte", "mnli")

#: At the brief scales (smoke, quick) the tasks beside the main one learn from so much, no more.
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

RANKINGS = ("importance", "random", "inverse")


class RunSet(NamedTuple):
    """A named set of experiments, and how far each of them is taken.

    Attributes:
        stage: ``importance``: the teacher's neurons are scored; ``converted``: the teacher is
            converted and evaluated; ``student``: the converted model is trained as well.
        grid: Lists the experiments: settings and a notebook's parameters to a :data:`Grid`.
    """

    stage: str
    grid: Callable[..., Grid]


#: Every set by name. The functions below that are marked with a stage enter themselves.
SETS: dict[str, RunSet] = {}


def _taken_to(stage: str) -> Callable:
    def register(grid: Callable[..., Grid]) -> Callable[..., Grid]:
        SETS[grid.__name__] = RunSet(stage, validate_call(grid))
        return grid

    return register


def points(name: str, settings: Settings, **parameters: Any) -> Grid:
    """The experiments of a named set.

    A plan finds this call in a notebook's code: write the name as text, pass the notebook's
    ``settings``, and its parameters by keyword.

    Args:
        name: One of :data:`SETS`, such as ``ablations``.
        settings: The default configuration.
        parameters: What the set's function takes further, such as ``fractions``.

    Raises:
        UserError: no set of this name, with the nearest one; or a parameter that it does not
            take, or outside its range.

    Example:
        >>> list(points("routers", Settings.at("smoke")))
        ['hash-random', 'hash-balance', 'gate-token', 'gate-sentence']
    """
    if name not in SETS:
        raise UserError(f"no set of experiments '{name}'; {nearest(name, SETS)}")
    try:
        return SETS[name].grid(settings, **parameters)
    except ValidationError as error:
        first = error.errors()[0]
        parameter, reason = first["loc"][0], first["msg"].removeprefix("Value error, ")
        value = parameters.get(parameter)
        raise UserError(f"{parameter}={value!r}: {reason[0].lower()}{reason[1:]}") from None


def _several(values: list[int]) -> list[int]:
    if len(values) == 1 or len({*values}) < len(values):
        raise ValueError("expected two or more different numbers")
    return values


def _task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"no task '{name}'; {nearest(name, TASKS)}")
    return name


# Types of parameters. An empty list stands for the scale's own values.
Fractions = Annotated[list[Annotated[int, Field(ge=2)]], AfterValidator(_several)]
Numbers = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_several)]
Thirds = Annotated[list[Annotated[int, Field(ge=0, le=3)]], AfterValidator(_several)]
Tasks = list[Annotated[str, AfterValidator(_task)]]


def over_seeds(*several: Settings) -> list[Settings]:
    """Each experiment with its ``n_seeds`` seeds; a random ranking is drawn anew for each."""
    return [
        settings.but(seed=settings.seed + k, split_seed=settings.seed + k)
        for settings in several
        for k in range(settings.n_seeds)
    ]


def with_sizes(settings: Settings) -> Settings:
    """The settings with the sizes of experts spelled out."""
    size, shared = settings.sizes(_width(settings))
    return settings.but(expert_size=size, n_shared=shared)


def _width(settings: Settings) -> int:
    return shape(settings.model).neurons


def _one_teacher(settings: Settings) -> Settings:
    """The settings with the teacher's seed fixed, so that other seeds share the teacher."""
    return settings.but(teacher_seed=settings.dense_seed)


# Notebook 1: importance.


@_taken_to("importance")
def importance(settings: Settings, other_tasks: Tasks = ()) -> Grid:
    """The main task and those to compare it with: named, or at the brief scales the built-in."""
    built_in = [name for name, task in TASKS.items() if task.source == "built-in"]
    others = other_tasks or (built_in if settings.brief else [])
    return {name: [on_task(settings, name)] for name in dict.fromkeys([settings.task, *others])}


@_taken_to("converted")
def explorer(settings: Settings) -> Grid:
    """Conversions by importance, whose accuracy the explorer shows beside the sizes of experts.

    2, 4 and 8 experts that fill the layer between them, none to nearly all of each shared, and
    hash routing; two routing tables where notebook 2 asks for the same runs, with the settings'
    own number of experts. A teacher's scores decide all else.
    """
    plain = {name: Settings.model_fields[name].default for name in PLAIN}
    base, width = _one_teacher(settings).but(**plain), _width(settings)
    grid = {}
    for n in (n for n in (2, 4, 8) if n <= width):
        size, tables = width // n, 2 if n == settings.n_experts else 1
        grid[f"{n} experts"] = [
            base.but(n_experts=n, expert_size=size, seed=settings.seed + k, n_shared=shared)
            for shared in (round(size * part) for part in SHARED_PARTS)
            for k in range(tables)
        ]
    return grid


# Notebook 2: experts, before any training. All have one teacher.


@_taken_to("converted")
def rankings(settings: Settings) -> Grid:
    """By each ranking as many conversions as ``n_random_splits``."""
    base = _one_teacher(settings)
    return {ranking: _draws(base, settings.n_random_splits, ranking) for ranking in RANKINGS}


@_taken_to("converted")
def rankings_by_shared(settings: Settings) -> Grid:
    """By neurons shared: two conversions by each ranking."""
    width, base = _width(settings), _one_teacher(settings)
    n, (size, _) = settings.n_experts, settings.sizes(width)
    least = max(0, -((width - n * size) // max(n - 1, 1)))  # with fewer, the layer is too narrow
    grid = {}
    for shared in sorted({max(least, round(size * part)) for part in SHARED_PARTS}):
        sized = base.but(n_shared=shared)
        grid[f"{shared} shared"] = [
            point for ranking in RANKINGS for point in _draws(sized, 2, ranking)
        ]
    return grid


def _draws(settings: Settings, n: int, ranking: str) -> list[Settings]:
    """With ``n`` routing tables, and as many random rankings."""
    return [settings.but(ranking=ranking, seed=settings.seed + k, split_seed=k) for k in range(n)]


@_taken_to("converted")
def untrained_constructions(settings: Settings) -> Grid:
    """:func:`constructions` with one teacher."""
    return constructions(_one_teacher(settings))


# Notebook 3: distillation.


@_taken_to("student")
def distillation(settings: Settings) -> Grid:
    """The experiment itself; then over seeds distilled, and on the task loss alone (Table 3)."""
    layers = settings.distill if settings.distill != "none" else "all"
    arms = {"distilled": layers, "task loss only": "none"}
    over = {name: over_seeds(settings.but(distill=which)) for name, which in arms.items()}
    return {"main": [settings], **over}


@_taken_to("converted")
def untrained_rankings(settings: Settings) -> Grid:
    """The conversions that notebook 3 compares with its students: random and inverse."""
    return {name: over_seeds(settings.but(ranking=name)) for name in ("random", "inverse")}


# Notebook 4: ablations.


def expert_sizes(settings: Settings, width: int, fraction: int) -> tuple[int, int]:
    """``(expert_size, n_shared)`` of experts a ``fraction``-th as wide as the layer (Fig. 2a).

    Two thirds are shared, whatever the default shares; the default's own width is the default.
    """
    size, shared = settings.sizes(width)
    narrow = width // fraction
    return (narrow, shared if narrow == size else -(-2 * narrow // 3))


@_taken_to("student")
def ablations(
    settings: Settings,
    *,
    fractions: Fractions = (),
    numbers: Numbers = (),
    thirds: Thirds = (),
) -> Grid:
    """Figures 2a-c and 3a-b, by figure: one setting changed at a time.

    Args:
        settings: The default configuration, part of every figure.
        fractions: Fig. 2a: the layer's width over the expert size; two thirds are shared
            throughout. None here and below: the paper's points at the scales
            ``base`` and ``paper``, else fewer.
        numbers: Fig. 2b: experts; those that the layer cannot fill are left out.
        thirds: Fig. 2c: shared thirds of an expert.

    Raises:
        UserError: fewer than two of the given numbers of experts fit.
    """
    whole = not settings.brief
    fractions = fractions or ((24, 8, 4, 2) if settings.scale in ("base", "paper") else (8, 4, 2))
    counts = numbers or ((1, 2, 4, 8) if whole else (1, 4, 8))
    thirds = thirds or ((0, 1, 2, 3) if whole else (0, 2, 3))
    width, base = _width(settings), with_sizes(settings)
    size, shared = base.expert_size, base.n_shared
    widths = [expert_sizes(settings, width, f) for f in fractions if width // f]
    most = (width - shared) // (size - shared) if size > shared else width
    fitting = [n for n in counts if n <= most]
    if numbers and len(fitting) < 2:
        raise UserError(
            f"numbers={list(numbers)}: expected two or more from 1 to {most}, which is what fits"
        )
    varied = {
        "figure2a": [base.but(expert_size=k, n_shared=s) for k, s in widths],
        "figure2b": [base.but(n_experts=n) for n in fitting],
        "figure2c": [base.but(n_shared=size * t // 3) for t in thirds],
        "figure3a": [base.but(ranking=ranking) for ranking in RANKINGS],
        "figure3b": [base.but(distill=which) for which in ("all", "skip", "last")],
    }
    return {name: over_seeds(*values) for name, values in varied.items()}


@_taken_to("student")
def plain_training(settings: Settings) -> Grid:
    """Table 3 by task: with and without distillation.

    At scale ``paper`` on the paper's three tasks, if the experiment is on one of them.
    """
    whole = settings.scale == "paper" and settings.task in TABLE3_TASKS
    names = [t for t in TABLE3_TASKS if t in tasks(settings)] if whole else [settings.task]
    both = [with_sizes(settings).but(distill=which) for which in ("all", "none")]
    return {name: over_seeds(*(on_task(point, name) for point in both)) for name in names}


@_taken_to("student")
def constructions(settings: Settings) -> Grid:
    """Every way to build experts, with shared neurons and without, by name.

    The brief scales leave out those without, which take most of the time. Nor is there an
    inverse one: with none shared it deals the same hands, to experts of other numbers.

    Returns:
        Runs by ``"<way>"`` and ``"<way>, none shared"``.
    """
    base = with_sizes(settings)
    grid = {}
    for n in (base.n_shared, 0)[: 1 if settings.brief or not base.n_shared else 2]:
        for name, changes in CONSTRUCTIONS.items():
            if n or name != "inverse":
                points = over_seeds(base.but(n_shared=n, **changes))
                grid[name + (", none shared" if not n else "")] = points
    return grid


@_taken_to("student")
def controls(settings: Settings) -> Grid:
    """What the experts are compared with, which the paper lacks; each trained as the student is.

    ``one expert`` and ``half depth`` cost as much as the experts, at the paper's sizes; ``dense
    trained on`` is the teacher itself, trained for the student's further steps.
    """
    base, half = with_sizes(settings), settings.but(student="half-depth")
    whole = {"n_experts": 1, "expert_size": _width(settings), "n_shared": 0}
    points = {
        "experts": base,
        "experts, task loss only": base.but(distill="none"),
        "one expert": base.but(n_experts=1),
        "dense trained on": settings.but(**whole, distill="none"),
        "half depth": half,
        "half depth, task loss only": half.but(distill="none"),
    }
    return {name: over_seeds(point) for name, point in points.items()}


def deals_beside(names: Iterable[str]) -> dict[str, str]:
    """The deal that each of :func:`constructions` is compared with: with as many shared."""
    return {n: "deal, none shared" if n.endswith("none shared") else "deal" for n in names}


# Notebook 5: routing.


@_taken_to("converted")
def untrained_routers(settings: Settings) -> Grid:
    """Every router of the paper, and both gates with the release's scaling."""
    gates = [router for router in ROUTINGS if router.startswith("gate-")]
    places = [(router, "inside") for router in ROUTINGS] + [(gate, "outside") for gate in gates]
    return {
        f"{router}, {place}": [settings.but(routing=router, gate_scaling=place)]
        for router, place in places
    }


@_taken_to("student")
def routers(settings: Settings) -> Grid:
    """Figure 3c by router, and the token gate that the paper leaves out."""
    return {router: over_seeds(settings.but(routing=router)) for router in ROUTINGS}


@_taken_to("student")
def beyond_routers(settings: Settings) -> Grid:
    """A hash by clusters of words and two experts a token, beside their usual forms."""
    hashes, gate = ("hash-random", "hash-cluster"), settings.but(routing="gate-token")
    named = {routing: settings.but(routing=routing) for routing in hashes}
    named |= {f"gate-token, k = {k}": gate.but(gate_top_k=min(k, gate.n_experts)) for k in (1, 2)}
    return {name: over_seeds(point) for name, point in named.items()}


#: Remedies against the collapse of a gate, each alone. The balance loss has our default weight
#: and ten times that, noise V-MoE's deviation for four experts, capacity Switch Transformer's.
REMEDIES: dict[str, dict[str, Any]] = {
    "no remedy": {"balance_weight": 0.0},
    "balance loss 0.01": {"balance_weight": 0.01},
    "balance loss 0.1": {"balance_weight": 0.1},
    "noise": {"balance_weight": 0.0, "gate_noise": 0.25},
    "capacity": {"balance_weight": 0.0, "gate_capacity": 1.25},
    "balanced assignment": {"balance_weight": 0.0, "gate_assignment": "balanced"},
    "started from the experts": {"balance_weight": 0.0, "gate_start": "experts"},
    "fitted to the nearest": {"balance_weight": 0.0, "gate_start": "nearest"},
}


@_taken_to("student")
def gate_remedies(settings: Settings) -> Grid:
    """Each remedy for a gate that sends everything to one expert, as ``"<gate>: <remedy>"``.

    The offline scales try them on the token gate with one seed.
    """
    gates = ("gate-token",) if settings.offline else ("gate-sentence", "gate-token")
    over = (lambda point: [point]) if settings.offline else over_seeds
    return {
        f"{gate}: {name}": over(settings.but(routing=gate, **changes))
        for gate in gates
        for name, changes in REMEDIES.items()
    }


# Notebook 6: results.


def tasks(settings: Settings, names: Sequence[str] = ()) -> list[str]:
    """The main task, and those named, or all that the scale and its data have."""
    if settings.data_dir:
        there = [name for name in TASKS if (Path(settings.data_dir) / name).is_dir()]
    elif settings.brief:
        there = [name for name, task in TASKS.items() if task.source == "built-in"]
    else:
        there = list(TABLE7)
    return list(dict.fromkeys([settings.task, *(names or there)]))


def on_task(settings: Settings, task: str) -> Settings:
    """The experiment on another task: in full, or at the brief scales in brief.

    In brief there is less to learn from; students see as many examples as on the main task.
    """
    if task == settings.task:
        return settings
    built_in = TASKS[task].source == "built-in"
    other = settings.on(task, **({"data_dir": ""} if built_in else {}))
    if not settings.brief:
        return other
    less = {name: min(n, getattr(other, name) or n) for name, n in BRIEF.items()}
    again = (other.max_train_examples or 0) / less["max_train_examples"]
    return other.but(**less, epochs=other.epochs * max(again, 1.0))


def results(settings: Settings, names: Sequence[str]) -> Grid:
    """Tables 1 and 2 over tasks, Table 3's plain training, Table 4's BERT-large.

    Without distillation the paper has three tasks; scale ``small`` trains all of its own, since a
    claim over tasks needs them, and the brief scales only the main one. So it is with the
    rankings of Figure 3a, which the paper has for one task.
    """
    base = settings.but(distill="all")
    each = {task: on_task(base, task) for task in names}
    paper = settings.scale == "paper"
    plain = [task for task in names if not paper or task in TABLE3_TASKS]
    plain = [settings.task] if settings.brief else plain
    large = [task for task in names if paper and task in TABLE4_TASKS]
    ranked = names if settings.scale == "small" else []
    others = [each[task].but(ranking=name) for task in ranked for name in ("random", "inverse")]
    return {
        "tables 1 and 2": over_seeds(*(each[task] for task in names)),
        "table3": over_seeds(*(each[task].but(distill="none") for task in plain)),
        "deals": over_seeds(*others),
        "table4": over_seeds(*(base.on(task, model=LARGE, expert_size=None) for task in large)),
    }


@_taken_to("student")
def claims(settings: Settings, *, names: Tasks = (), ablate: bool = True) -> Grid:
    """All that notebook 6 judges: :func:`results`, and on the main task notebooks 4's and 5's runs.

    Args:
        settings: The default configuration.
        names: Tasks beside the main one; none: all that scale and data have.
        ablate: Whether to ask for the runs of notebooks 4 and 5.
    """
    grid = results(settings, tasks(settings, names))
    if ablate:
        figure3c = list(chain.from_iterable(routers(settings).values()))
        grid |= ablations(settings) | {"figure3c": figure3c}
    return grid


# Notebook 8: the release.


@_taken_to("student")
def switches(settings: Settings) -> Grid:
    """One switch at a time where paper and release differ, then all of them.

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


@_taken_to("importance")
def importance_splits(settings: Settings) -> Grid:
    """Importance scored on the training split, as in the paper, and on validation (release)."""
    return {name: [settings.but(importance_split=name)] for name in ("train", "validation")}


# Notebook 9: findings.


@_taken_to("student")
def findings(
    settings: Settings, *, names: Tasks = (), ablated: Tasks = (), switch_epochs: float = 0
) -> Grid:
    """The experiments that notebook 9 reads: those of notebooks 4, 5, 6 and 8.

    Args:
        settings: The default configuration.
        names: Tasks beside the main one; none: all that scale and data have.
        ablated: Of these, the tasks that have all ablations too.
        switch_epochs: Training of notebook 8's students; 0: as the others.

    Returns:
        ``claims``; for the main task and each ablated one ``claims on TASK`` and every
        ``TASK: CONSTRUCTION``; every ``router: NAME`` and ``switch: NAME``.
    """
    brief = settings.but(epochs=switch_epochs) if switch_epochs else settings
    grid = {"claims": _all(claims(settings, names=names))}
    for task in [settings.task, *ablated]:
        other = on_task(settings, task)
        grid[f"claims on {task}"] = _all(claims(other, names=[task]))
        grid |= _named(f"{task}: ", constructions(other))
    grid |= _named("router: ", beyond_routers(settings))
    return grid | _named("switch: ", switches(brief))


def _all(grid: Grid) -> list[Settings]:
    return list(dict.fromkeys(chain.from_iterable(grid.values())))


def _named(prefix: str, grid: Grid) -> Grid:
    return {prefix + name: points for name, points in grid.items()}
