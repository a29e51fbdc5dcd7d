"""The runs that notebooks ask for, declared once: a notebook runs them, a plan lists them.

Every point is a complete, validated experiment. Points that several notebooks ask for are
equal, so the store runs them once.
"""

from collections.abc import Sequence
from pathlib import Path

from moebert_lib.paper import TABLE7
from moebert_lib.routing import ROUTINGS
from moebert_lib.scales import LARGE
from moebert_lib.settings import Settings
from moebert_lib.tasks import TASKS

Grid = dict[str, list[Settings]]

#: Tasks of Table 3 (no distillation) and Table 4 (BERT-large).
TABLE3_TASKS = ("rte", "mnli", "squad_v2")
TABLE4_TASKS = ("rte", "mnli")

#: At the offline scales the tasks beside the main one learn from so much, and no more.
BRIEF = {"max_train_examples": 1000, "max_eval_examples": 200, "importance_examples": 400}


def over_seeds(settings: Settings) -> list[Settings]:
    """The experiment with ``n_seeds`` seeds; a random deal is drawn anew for each."""
    seeds = [settings.seed + k for k in range(settings.n_seeds)]
    return [settings.but(seed=seed, split_seed=seed) for seed in seeds]


def ladder(settings: Settings) -> Grid:
    """Notebook 3: distilled, and trained as long on the task loss alone (Table 3)."""
    full = settings.distill if settings.distill != "none" else "all"
    return {which: over_seeds(settings.but(distill=which)) for which in (full, "none")}


def ablations(
    settings: Settings,
    width: int,
    *,
    fractions: Sequence[int] = (24, 8, 4, 2),
    numbers: Sequence[int] = (1, 2, 4, 8),
    thirds: Sequence[int] = (0, 1, 2, 3),
) -> Grid:
    """Notebook 4: Figures 2a-c, 3a-b and Table 3, one setting changed at a time.

    Args:
        settings: The default configuration, part of every figure.
        width: Neurons of a dense FFN.
        fractions: Fig. 2a: ``width`` over the expert size; two thirds are shared throughout.
        numbers: Fig. 2b: experts; those that the layer cannot fill are left out.
        thirds: Fig. 2c: shared thirds of an expert.
    """
    size, shared = settings.sizes(width)
    base = settings.but(expert_size=size, n_shared=shared)
    widths = [(width // f, -(-2 * (width // f) // 3)) for f in fractions]
    fitting = [n for n in numbers if shared + n * (size - shared) <= width]
    varied = {
        "figure2a": [base.but(expert_size=k, n_shared=s) for k, s in widths],
        "figure2b": [base.but(n_experts=n) for n in fitting],
        "figure2c": [base.but(n_shared=size * t // 3) for t in thirds],
        "figure3a": [base.but(ranking=deal) for deal in ("importance", "random", "inverse")],
        "figure3b": [base.but(distill=which) for which in ("all", "skip", "last")],
        "table3": [base.but(distill=which) for which in ("all", "none")],
    }
    return {name: [run for point in points for run in over_seeds(point)]
            for name, points in varied.items()}  # fmt: skip


def routers(settings: Settings) -> Grid:
    """Notebook 5: Figure 3c, and the token gate that the paper leaves out."""
    return {"figure3c": [run for r in ROUTINGS for run in over_seeds(settings.but(routing=r))]}


def tasks(settings: Settings, asked: Sequence[str] = ()) -> list[str]:
    """Tasks of notebook 6: those asked for, else all that the scale and its data have."""
    if asked:
        return list(asked)
    built_in = [name for name, task in TASKS.items() if task.source == "built-in"]
    if settings.offline and not settings.data_dir:
        return [settings.task, *(name for name in built_in if name != settings.task)]
    if settings.data_dir:
        return [name for name in TASKS if (Path(settings.data_dir) / name).is_dir()]
    return list(TABLE7)


def on_task(settings: Settings, task: str) -> Settings:
    """The experiment on another task: in brief at the offline scales, else in full."""
    if task == settings.task:
        return settings
    built_in = TASKS[task].source == "built-in"
    other = settings.on(task, **({"data_dir": ""} if built_in else {}))
    if not settings.offline:
        return other
    return other.but(**{name: min(n, getattr(other, name) or n) for name, n in BRIEF.items()})


def results(settings: Settings, names: Sequence[str]) -> Grid:
    """Notebook 6: Tables 1 and 2 over tasks, Table 3's plain training, Table 4's BERT-large.

    Without distillation the paper has three tasks; the smaller scales train all of theirs, since
    a claim over tasks needs them.
    """
    each = {task: on_task(settings.but(distill="all"), task) for task in names}
    paper = settings.scale == "paper"
    plain = [task for task in names if not paper or task in TABLE3_TASKS]
    large = [task for task in names if paper and task in TABLE4_TASKS]
    return {
        "tables 1 and 2": [run for task in names for run in over_seeds(each[task])],
        "table3": [run for task in plain for run in over_seeds(each[task].but(distill="none"))],
        "table4": [run for task in large
                   for run in over_seeds(settings.on(task, model=LARGE, expert_size=None))],
    }  # fmt: skip


def switches(settings: Settings) -> Grid:
    """Notebook 8: one switch at a time where paper and release differ, then all of them.

    Gates have a baseline of their own, since where they scale matters to nothing else.
    """
    base = settings.but(preset="paper")
    gate = base.but(routing="gate-token")
    points = {
        "paper": base,
        "importance on validation": base.but(importance_split="validation"),
        "teacher with dropout": base.but(teacher_dropout=True),
        "shared neurons tied": base.but(shared_neurons="tied"),
        "one LayerNorm for all": base.but(expert_layer_norm="shared"),
        "padding counted": base.but(padding_in_loss=True),
        "release": base.but(preset="release"),
        "gate, inside": gate,
        "gate, outside": gate.but(gate_scaling="outside"),
    }
    return {name: over_seeds(point) for name, point in points.items()}
