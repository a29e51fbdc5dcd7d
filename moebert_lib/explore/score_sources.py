"""What can be explored: the scores of this home's teachers, and files of scores.

A source is put together from the store alone: its importance, the teacher it scored, what
excites the teacher's neurons, and every conversion by importance that was judged. A file brings
its scores and nothing else.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoConfig

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.presets import SCALES, SHAPES, Shape
from moebert_lib.config.settings import Settings
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import ablations, neuron_measurements, stage_keys, student, teacher
from moebert_lib.experiments.neuron_measurements import Excitation
from moebert_lib.experiments.stage_keys import DATA, TEACHER
from moebert_lib.experiments.teacher import importance_key
from moebert_lib.method import encoder_layouts, release_files
from moebert_lib.method.importance import Importance
from moebert_lib.model.moe_layer import ParameterCounts
from moebert_lib.store.committed_results import AnyStore
from moebert_lib.store.store import Entry, StageKey

#: Names of the scores in menus, the paper's first.
EQ4, ACTIVE, LARGE = "importance (Eq. 4)", "mean activation", "size of weights"
ENDINGS = (".safetensors", ".pkl")


@dataclass(frozen=True, eq=False)
class Source:
    """Scores of one model's neurons, and what is known of the model.

    Attributes:
        name: As menus show it; unlike that of any other source of a list.
        scores: By name, :data:`EQ4` first, each ``(L, F)``.
        about: ``task``, ``scale``, ``seed`` and ``model``, as far as known.
        sizes: The model's sizes; None where no model of such layers is known.
        head: Parameters that ``encoder_layouts.parameters`` leaves out.
        accuracy: Judged conversions: ``n_experts``, ``expert_size``, ``n_shared``, ``seed`` and
            the metric, 0 to 1, as ``value``. Empty where none is known.
        metric: Its name.
        dense: The metric of the dense teacher; None where unknown.
        excited: What excites the neurons; None where unknown.
        silent: Then why, in a sentence.
        origin: Digest of the scores' entry in the store; "" of a file.
    """

    name: str
    scores: dict[str, np.ndarray]
    about: dict = field(default_factory=dict)
    sizes: Shape | None = None
    head: int = 0
    accuracy: pd.DataFrame = field(default_factory=pd.DataFrame)
    metric: str = ""
    dense: float | None = None
    excited: Excitation | None = None
    silent: str = ""
    origin: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and neurons of each, ``(L, F)``."""
        return self.scores[EQ4].shape

    def parameters(self, n_experts: int, expert_size: int) -> ParameterCounts | None:
        """Effective (of one token) and stored parameters of a MoEBERT with hash routing.

        With a LayerNorm for each expert; without a head where ``head`` is 0. ``n_experts=0``
        counts the dense model. None where the model's sizes are unknown.
        """
        if self.sizes is None:
            return None
        counts = encoder_layouts.parameters(
            self.sizes, n_experts=n_experts, expert_size=expert_size
        )
        return ParameterCounts(*(n + self.head for n in counts))

    def heading(self, score: str, layer: int) -> tuple[str, str]:
        """Two lines over a column: what is ranked by what, and where it comes from."""
        first, _, rest = self.name.partition(" · ")
        n_layers, width = self.shape
        where = rest or f"file, {n_layers} layers of {width:,}"
        return f"{first}: {score}", f"layer {layer} · {where}"

    def nearest(self, n_experts: int, expert_size: int, n_shared: int) -> pd.DataFrame:
        """The judged conversions whose sizes are nearest: one row a run; empty where none is.

        What a token sees comes first: the ratio of the experts' sizes, then the neurons shared,
        then the number of experts. Experts that share everything are one and the same, whatever
        their number, so one expert is compared as that.
        """
        if self.accuracy.empty:
            return self.accuracy
        known = self.accuracy[["n_experts", "expert_size", "n_shared"]].to_numpy()
        sizes, wanted = (
            np.array([_same(*each) for each in all_of])
            for all_of in (known, [(n_experts, expert_size, n_shared)])
        )
        number, _, shared = np.abs(sizes - wanted).T
        ratio = np.abs(np.log(sizes[:, 1] / wanted[0, 1]))
        first = np.lexsort((number, shared, ratio.round(9)))[0]
        return self.accuracy[(known == known[first]).all(1)]


def from_settings(
    store: AnyStore, settings: Settings, conversions: ablations.Grid | None = None
) -> Source:
    """The scores of an experiment's teacher, with all that the explorer shows of them.

    Teacher, scores, excitation and conversions come from the store or are made now.

    Args:
        store: Where the stages are, or will be.
        settings: The experiment.
        conversions: Whose accuracy is shown; those of ``ablations.explorer`` by default.
    """
    teacher.importance(store, settings)
    neuron_measurements.excitation(store, settings)
    conversions = conversions or ablations.points("explorer", settings)
    count = sum(map(len, conversions.values()))
    print(f"· accuracy right after conversion, for {count} partitions", flush=True)
    student.compare(store, conversions, run=student.conversion)
    scored = store.find(importance_key(store, settings))
    return _source(store, scored, _by_kind(store), settings.scale)


def from_store(store: AnyStore) -> list[Source]:
    """All that was scored in this home, each with a name of its own.

    What can show a neuron's tokens comes first, and the newest of those.
    """
    there = _by_kind(store)
    found = [_source(store, entry, there) for entry in reversed(store.entries("importance"))]
    known = [source for source in found if source is not None]
    return distinct(sorted(known, key=lambda source: source.excited is None))


def beside(store: AnyStore, mine: Source) -> list[Source]:
    """A source and, after it, all others of this home."""
    return distinct([mine, *(other for other in from_store(store) if other.origin != mine.origin)])


def from_file(path: str | Path) -> Source:
    """Scores of a file: of ``Importance.save``, or a pickle of the paper's release.

    Raises:
        UserError: no such file, an unknown ending, or no scores in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        others = [p.name for ending in ENDINGS for p in path.parent.glob(f"*{ending}")]
        hint = f"; {nearest(path.name, others)}" if others else ""
        raise UserError(f"no file {path}; expected scores ending in {' or '.join(ENDINGS)}{hint}")
    if path.suffix not in ENDINGS:
        raise UserError(f"{path.name}: expected scores ending in {' or '.join(ENDINGS)}")
    try:
        scores = release_files.read(path) if path.suffix == ".pkl" else Importance.load(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    layers, width = scores.scores.shape
    shapes = [s for s in SHAPES.values() if (s.layers, s.neurons) == (layers, width)]
    known = {name: scores.meta[name] for name in ("task", "model") if name in scores.meta}
    return Source(
        path.name,
        {EQ4: _numbers(scores.scores)},
        {"task": path.stem.removeprefix("importance_"), **known},
        sizes=shapes[0] if shapes else None,
        silent=f"{path.name} holds scores only. Which tokens excite a neuron takes the model.",
    )


def distinct(found: list[Source]) -> list[Source]:
    """The sources, those of one name numbered from the second on."""
    seen: dict[str, int] = {}
    named = []
    for source in found:
        seen[source.name] = again = seen.get(source.name, 0) + 1
        name = source.name if again == 1 else f"{source.name} ({again})"
        named.append(replace(source, name=name))
    return named


def _same(n_experts: int, expert_size: int, n_shared: int) -> tuple[int, int, int]:
    """Sizes by which models that are the same are equal: one expert shares all of itself."""
    if n_experts == 1 or n_shared == expert_size:
        return 1, expert_size, expert_size
    return n_experts, expert_size, n_shared


def _by_kind(store: AnyStore) -> dict[str, list[Entry]]:
    return {kind: store.entries(kind) for kind in ("teacher", "excitation", "converted")}


def _source(
    store: AnyStore, scored: Entry, there: dict[str, list[Entry]], scale: str = ""
) -> Source | None:
    """An entry of scores with what else is there of its teacher; None without a teacher."""
    teacher_key = scored.key.choices["teacher"]
    place = store.folder(teacher_key)
    dense = next((e for e in there["teacher"] if store.folder(e.key) == place), None)
    if dense is None:
        return None
    chosen = teacher_key.choices
    about = {
        "task": chosen["task"],
        "scale": scale or _scale(chosen),
        "seed": chosen["teacher_seed"],
        "model": chosen["model"],
    }

    def by_these_scores(entry: Entry) -> bool:
        parent = entry.key.choices.get("importance")
        return isinstance(parent, StageKey) and store.folder(parent) == store.folder(scored.key)

    scores = {EQ4: _numbers(Importance.load(scored.folder / "importance.safetensors").scores)}
    passed = list(filter(by_these_scores, there["excitation"]))
    excited = neuron_measurements.read_excitation(passed[-1].folder) if passed else None
    if excited:
        scores |= {ACTIVE: _numbers(excited.mean), LARGE: _numbers(excited.magnitude)}
    sizes = encoder_layouts.shape(str(dense.folder))
    metric = TASKS[about["task"]].metric
    return Source(
        _name(about, scored.key.choices["importance_split"]),
        scores,
        about,
        sizes=sizes,
        head=head_parameters(dense.folder),
        accuracy=_judged(filter(by_these_scores, there["converted"]), metric),
        metric=metric,
        dense=dense.row[metric],
        excited=excited,
        silent=""
        if excited
        else "The pass that finds them has not been made; notebook 1 makes it.",
    )


def _name(about: dict, split: str) -> str:
    model = about["model"].rpartition("/")[2]
    scored = "" if split == "train" else f", scored on {split}"
    return f"{about['task']} · {about['scale']}, seed {about['seed']}, {model}{scored}"


def _scale(chosen: Mapping[str, Any]) -> str:
    """The scale of a teacher's choices, in full or for a side task; else "own settings"."""
    task, model = chosen["task"], chosen["model"]
    for scale in SCALES:
        whole = Settings.at(scale, task=task, model=model)
        brief = ablations.on_task(Settings.at(scale, model=model), task)
        for settings, name in ((whole, scale), (brief, f"{scale}, in brief")):
            usual = stage_keys.chosen(settings, (*DATA, *TEACHER))
            if all(chosen.get(each) == value for each, value in usual.items()):
                return name
    return "own settings"


def _judged(judged: Iterable[Entry], metric: str) -> pd.DataFrame:
    """Conversions by one teacher's scores, with default switches."""
    usual = {name: Settings.model_fields[name].default for name in ablations.PLAIN}
    names = ("n_experts", "expert_size", "n_shared", "seed")
    rows = [
        {name: entry.key.choices[name] for name in names} | {"value": entry.row[metric]}
        for entry in judged
        if all(entry.key.choices[name] == value for name, value in usual.items())
    ]
    return pd.DataFrame(rows).drop_duplicates([*names], keep="last") if rows else pd.DataFrame()


def head_parameters(folder: Path) -> int:
    """Parameters of a saved model that ``encoder_layouts.parameters`` leaves out, by its config.

    A class or a value is read from the pooler, which is counted; a span from each token, and that
    model has no pooler, so that the number is negative.
    """
    config = AutoConfig.from_pretrained(folder)
    pooler = config.hidden_size if config.architectures == ["BertForQuestionAnswering"] else 0
    return (config.hidden_size + 1) * (config.num_labels - pooler)


def _numbers(scores) -> np.ndarray:
    return scores.double().numpy()
