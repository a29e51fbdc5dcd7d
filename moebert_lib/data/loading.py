"""Load and check the examples of a task: built-in text, local files, or the hub.

Local files have the layout ``DIR/<task>/train.jsonl`` and ``validation.jsonl`` with the hub's
column names; MNLI has ``validation_matched`` and ``validation_mismatched``. Parquet works as well,
also in the hub's shards, and for SQuAD the official nested ``train.json``. One reader serves the
check and the run, without a cache. GLUE's test sets are left out: their labels are not public.
"""

import functools
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.file_io import write_bytes
from moebert_lib.config.settings import Settings
from moebert_lib.data import builtin_corpus, squad, subsample
from moebert_lib.data.subsample import CAP, HELD_OUT, SECOND_TEST, draw
from moebert_lib.data.tasks import TASKS, Task, build

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# datasets takes seconds to import; a refusal should not wait for it.

#: Dataset and revision on the hub, by a task's source and, for SQuAD, its name.
HUB = {
    "glue": ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"),
    "squad": ("rajpurkar/squad", "7b6d24c440a36b6815f21b70d25016731768db1f"),
    "squad_v2": ("rajpurkar/squad_v2", "3ffb306f725f7d2ce8394bc1873b24868140c412"),
}
SMOKE_FILES = 5  # of each package: a second to read, enough for every built-in task
POSITION_SEED = 0  # of subsample="position": every run at a scale sees the same examples
EXPECTED = "sst2/train.jsonl or similar"


@dataclass(frozen=True)
class TaskData:
    """A task's splits, with the columns ``Task.columns``.

    ``also`` holds further validation sets by the suffix of their metrics: ``mismatched`` for MNLI
    where there is such a file, and ``second_test`` where the settings ask for one. ``held_out``
    is the part of the training examples that the settings keep from training.
    """

    task: Task
    train: "Dataset"
    validation: "Dataset"
    also: "dict[str, Dataset]"
    held_out: "Dataset | None"
    digest: str


def check(settings: Settings) -> None:
    """Refuse whatever can be refused without compute or network.

    Raises:
        UserError: an unknown task; a task without files at an offline scale; files for a built-in
            task; a folder, file, column, example or label that is wrong; windows of a
            span task that do not fit, or ``cache_teacher`` with a span task; a second test set
            that leaves nothing to train on.
    """
    if settings.task not in TASKS:
        raise UserError(f"unknown task '{settings.task}'; {nearest(settings.task, TASKS)}")
    task = TASKS[settings.task]
    wrong = squad.problem(settings.max_length, settings.doc_stride) if task.kind == "span" else ""
    if wrong:
        raise UserError(f"task '{task.name}': {wrong}")
    if settings.cache_teacher and task.kind == "span":
        raise UserError(
            f"task '{task.name}': cache_teacher=True keeps a teacher that classifies "
            "sentences; expected cache_teacher=False"
        )
    if settings.data_dir:
        _check_second_test(settings, check_files(task, settings.data_dir)["train"])
    elif task.source != "built-in" and settings.offline:
        built_in = ", ".join(name for name, task in TASKS.items() if task.source == "built-in")
        raise UserError(
            f"task '{task.name}' needs a data_dir DIR with DIR/{task.name}/train.jsonl at scale "
            f"{settings.scale}, which is offline (--data-dir DIR, or papermill -p data_dir DIR); "
            f"built in are {built_in}"
        )


def _check_second_test(settings: Settings, n_train: int) -> None:
    if settings.second_test and settings.second_test > n_train // 2:
        raise UserError(
            f"second_test={settings.second_test}: task '{settings.task}' has {n_train} training "
            f"examples; expected at most half of them, {n_train // 2}"
        )


def load(settings: Settings) -> TaskData:
    """The task's splits, limited as the settings say.

    The second test set is drawn first, from all training examples, by their hash. Then a limit
    takes the same examples whatever the seeds: with ``subsample="hash"`` those of the lowest
    hashes, in this order, and without a limit all of them in this order; with ``"position"`` a
    random choice of the positions in the file. Built-in tasks take the first examples instead, in
    which classes are balanced. Of the training examples that are left, a share is held out, by
    their hash again. With ``evaluate_on="held-out"`` this part is the validation set, and the
    others are left out, so that settings are chosen without them.

    Raises:
        UserError: as :func:`check`, or the hub cannot be reached.
    """
    check(settings)
    task = TASKS[settings.task]
    read = _built_in if task.source == "built-in" else _read
    parts = {use: read(task, settings, split) for use, split in splits(task, settings).items()}
    for use in splits(task).keys() - parts.keys():
        print(f"· {settings.data_dir} has no {dict(task.also)[use]} of {task.name}: left out")
    if settings.second_test:
        _check_second_test(settings, len(parts["train"]))
        second_test = draw(parts["train"], settings.second_test, SECOND_TEST, task)
        parts["second_test"], parts["train"] = second_test
    limits = dict.fromkeys(parts, settings.max_eval_examples)
    limits |= {"train": settings.max_train_examples, "second_test": None}
    parts = {use: _limited(part, task, settings, limits[use]) for use, part in parts.items()}
    train, validation, held_out = parts.pop("train"), parts.pop("validation"), None
    if settings.held_out:
        n = max(1, round(settings.held_out * len(train)))
        held_out, train = draw(train, n, HELD_OUT, task)
    if settings.evaluate_on == "held-out":
        validation, parts = held_out, {}
    return TaskData(task, train, validation, parts, held_out, digest(settings))


def digest(settings: Settings) -> str:
    """SHA-256 of what decides the data: task, limits, and the text's or files' own digests."""
    task = TASKS[settings.task]
    if task.source == "built-in":
        source: Any = builtin_corpus.digest(files_per_package=_n_files(settings))
    elif settings.data_dir:
        names = splits(task, settings).values()
        paths = [path for name in names for path in files(task, settings.data_dir, name)]
        source = {path.name: _file_digest(path) for path in paths}
    else:
        source = _hub(task)
    limits = [settings.max_train_examples, settings.max_eval_examples]
    drawn = [settings.subsample, settings.second_test, settings.held_out, settings.evaluate_on]
    made = {"source": source, "code": provenance.code_of(load)}
    return provenance.digest({"task": task.name, "caps": limits, "drawn": drawn, **made})


def encode(
    dataset: "Dataset",
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    doc_stride: int = 128,
) -> "Dataset":
    """Token ids of every example, or of every window of a span task, not padded.

    Returns:
        Columns ``input_ids``, ``attention_mask``, ``token_type_ids`` (lists of at most
        ``max_length`` tokens), ``length`` in tokens, and ``labels`` where there is a ``label``;
        for a span task those of :func:`squad.encode`.
    """
    if task.kind == "span":
        with _no_progress_bars():
            return squad.encode(dataset, tokenizer, max_length=max_length, doc_stride=doc_stride)

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        texts = [rows[field] for field in task.fields]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length, padding=False))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if "label" in rows:
            kind = int if task.labels else float
            encoded["labels"] = [kind(label) for label in rows["label"]]
        return encoded

    with _no_progress_bars():
        return dataset.map(
            tokenize,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
        )


def _n_files(settings: Settings) -> int | None:
    return SMOKE_FILES if settings.scale == "smoke" else None


def _built_in(task: Task, settings: Settings, split: str) -> "Dataset":
    from datasets import Dataset

    sentences = builtin_corpus.sentences(files_per_package=_n_files(settings))
    return Dataset.from_list(build(task.name, [s for s in sentences if s.split == split]))


def _read(task: Task, settings: Settings, split: str) -> "Dataset":
    """One split of a GLUE or SQuAD task from local files or the hub."""
    from datasets import Dataset

    if not settings.data_dir:
        return downloaded(task, split)
    paths = files(task, settings.data_dir, split)
    return Dataset.from_list([row for path in paths for row in read_file(path, task)])


def downloaded(task: Task, split: str) -> "Dataset":
    """One split from the hub, at the pinned revision.

    Raises:
        UserError: the hub cannot be reached.
    """
    from datasets import load_dataset

    name, revision = _hub(task).values()
    part = [task.name] if task.source == "glue" else []
    try:
        with _no_progress_bars():
            loaded = load_dataset(name, *part, split=split, revision=revision)
    except (OSError, ValueError) as error:  # offline, unreachable, or not in the cache
        raise UserError(
            f"{name} cannot be loaded ({type(error).__name__}); give --data-dir DIR with "
            f"DIR/{task.name}/train.jsonl, or try again online"
        ) from None
    return loaded.select_columns([*task.columns])


def _hub(task: Task) -> dict[str, str]:
    name, revision = HUB["glue" if task.source == "glue" else task.name]
    return {"hub": name, "revision": revision}


def _limited(part: "Dataset", task: Task, settings: Settings, limit: int | None) -> "Dataset":
    """A split's examples, at most as many as the limit."""
    import numpy as np

    n = len(part) if limit is None else min(limit, len(part))
    if task.source == "built-in":
        return part.select(range(n))
    if settings.subsample == "hash":
        return draw(part, n, CAP, task)[0]
    order = np.random.default_rng(POSITION_SEED).permutation(len(part))
    return part if n == len(part) else part.select(order[:n], keep_in_memory=True)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


# Parts of datasets that results were made from, and how to get them again.


def part_name(settings: Settings) -> str:
    """The settings that decide which examples a part has, as a manifest names it."""
    names = ("subsample", "max_train_examples", "max_eval_examples", "second_test")
    values = {name: getattr(settings, name) for name in names}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value)


def add_to_manifest(settings: Settings, results: Path) -> Path:
    """List the examples of the settings' data in the manifest of a folder of results.

    Rows of the same task and part that are there are replaced.

    Returns:
        The manifest's path, ``RESULTS/examples.parquet``.

    Raises:
        UserError: as :func:`load`; or a built-in task, which needs no manifest.
    """
    import pandas as pd

    task = TASKS[settings.task]
    if task.source == "built-in":
        raise UserError(f"task '{task.name}' is built in: its examples come with the libraries")
    whole = dict(held_out=0.0, evaluate_on="validation", importance_split="train")
    loaded = load(settings.but(**whole))  # a held-out part is drawn again from the training part
    parts = {"train": loaded.train, "validation": loaded.validation, **loaded.also}
    names = splits(task) | {"second_test": "train"}
    added = subsample.manifest(parts, names, task, part_name(settings))
    path = results / subsample.MANIFEST
    if path.is_file():
        there = pd.read_parquet(path)
        same = (there["task"] == task.name) & (there["part"] == part_name(settings))
        added = pd.concat([there[~same], added], ignore_index=True)
    write_bytes(path, added.to_parquet(index=False, compression="zstd"))
    return path


def rebuild(results: Path, settings: Settings, folder: Path) -> list[Path]:
    """Write the data files that results were made from, out of the hub's pinned revision.

    Use them with ``data_dir=FOLDER`` and the same settings. Examples of the second test set follow
    those to train on in ``train.jsonl``; a run finds them there.

    Args:
        results: Folder with a manifest, such as ``figures/runs``.
        settings: The task, and what decides the part: ``subsample``, limits, ``second_test``.
        folder: Files are written to ``FOLDER/<task>/``; they must not be there yet.

    Returns:
        Their paths.

    Raises:
        UserError: no manifest, no such part in it, a file is there already, the hub cannot be
            reached, or it lacks examples.
    """
    import pandas as pd

    task, part, path = TASKS[settings.task], part_name(settings), results / subsample.MANIFEST
    if not path.is_file():
        raise UserError(f"no {subsample.MANIFEST} in {results}; expected figures/runs or similar")
    rows = pd.read_parquet(path)
    parts = rows.loc[rows["task"] == task.name, "part"].unique()
    if part not in parts:
        there = "; ".join(parts) or f"none of task '{task.name}'"
        raise UserError(f"{path} has no part '{part}' of task '{task.name}'; it has {there}")
    rows = rows[(rows["task"] == task.name) & (rows["part"] == part)]
    written = []
    for split, wanted in rows.groupby("split", sort=False):
        target = folder / task.name / f"{split}.jsonl"
        if target.exists():
            raise UserError(f"{target} exists already; give another folder")
        source = " at revision ".join(_hub(task).values())
        examples = subsample.select(downloaded(task, split), wanted, task, source).to_list()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in examples)
        write_bytes(target, "".join(lines).encode())
        written.append(target)
    return written


# Local files.


def splits(task: Task, settings: Settings | None = None) -> dict[str, str]:
    """Names of the files by use: train, validation, further validation sets.

    Args:
        task: The task.
        settings: Where given, a further set without a file in their ``data_dir`` is left out.
    """
    validation = "validation_matched" if task.name == "mnli" else "validation"
    further = dict(task.also)
    if settings and settings.data_dir:
        found = functools.partial(_found, _task_folder(task, settings.data_dir), task)
        further = {use: split for use, split in further.items() if found(split)}
    return {"train": "train", "validation": validation, **further}


def files(task: Task, data_dir: str, split: str) -> list[Path]:
    """The files of one split of a task: one, or the shards of one.

    Raises:
        UserError: a folder, file or shard is missing, or the task is built in and reads no files.
    """
    folder = _task_folder(task, data_dir)
    if paths := _found(folder, task, split):
        return paths
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise UserError(f"no {' or '.join(_names(task, split))} in {folder}; there is {there}")


def check_files(task: Task, data_dir: str) -> dict[str, int]:
    """Read every example that a run would read; return how many there are by use.

    A further validation set may be absent.

    Raises:
        UserError: as :func:`files`; or a file is empty, unreadable, or has an example without
            a column, with something else than text, or with a label that the task has not.
    """
    counts = {}
    for use, split in splits(task).items():
        if use in dict(task.also) and not _found(_task_folder(task, data_dir), task, split):
            continue
        paths = files(task, data_dir, split)
        counts[use] = sum(_count(path, task, _file_digest(path)) for path in paths)
    return counts


def read_file(path: Path, task: Task) -> list[dict[str, Any]]:
    """Every example of a file: the task's columns, each value as the file has it.

    Raises:
        UserError: the file cannot be read as what its ending says, is empty, or has an example
            that the task cannot have; with file, line and reason.
    """
    readers = {".jsonl": _lines, ".json": _nested, ".parquet": _table}
    examples = []
    for place, row in readers[path.suffix](path):
        if problem := _problem(row, task):
            raise UserError(f"{path}, {place}: {problem}")
        examples.append({name: row[name] for name in task.columns})
    if not examples:
        raise UserError(f"{path} is empty; expected one example a line")
    return examples


@functools.lru_cache(maxsize=64)  # a sweep checks the same files for each of its runs
def _count(path: Path, task: Task, _digest: str) -> int:
    return len(read_file(path, task))


def _names(task: Task, split: str) -> list[str]:
    return [f"{split}.{end}" for end in ("jsonl", *["json"] * (task.kind == "span"), "parquet")]


def _found(folder: Path, task: Task, split: str) -> list[Path]:
    """The file of a split, its shards, or nothing."""
    for name in _names(task, split):
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    n = len(shards)
    expected = [f"{split}-{i:05}-of-{n:05}.parquet" for i in range(n)]
    if [path.name for path in shards] != expected:
        raise UserError(
            f"{folder} has {n} shards of '{split}', the last {shards[-1].name}; "
            f"expected {expected[0]} to {expected[-1]}"
        )
    return shards


def _task_folder(task: Task, data_dir: str) -> Path:
    try:
        folder = Path(data_dir).expanduser()
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    except (OSError, RuntimeError, ValueError):  # absent, a file, no such user, no such path
        raise UserError(f"no data folder {data_dir}; expected one with {EXPECTED}") from None
    known = [name for name in there if name in TASKS]
    if task.source == "built-in":
        choice = f"choose one that is in {folder}: {', '.join(known)}"
        if not known:
            choice = f"{folder} holds no task's folder, expected {EXPECTED}"
        raise UserError(f"task '{task.name}' is built in and reads no files; {choice}")
    if task.name not in there:
        found = f"there are {', '.join(there)}" if there else "it holds no folders"
        if any((folder / f"train.{ending}").exists() for ending in ("jsonl", "json", "parquet")):
            found = "it holds one task's files itself: give the folder above it"
        raise UserError(f"no folder '{task.name}' in {folder}; {found}")
    return folder / task.name


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file of JSON lines; blank lines are skipped."""
    for number, line in enumerate(io.BytesIO(_bytes(path)), start=1):
        try:
            if line.strip():
                yield f"line {number}", json.loads(line, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError):
            raise UserError(
                f"{path}, line {number}: not a JSON object in which each name occurs once"
            ) from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return row


def _bytes(path: Path) -> bytes:
    with _unreadable_in_one_line(path):
        return path.read_bytes()


def _file_digest(path: Path) -> str:
    with _unreadable_in_one_line(path):
        return provenance.input_digest(path)


@contextmanager
def _unreadable_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _nested(path: Path) -> Iterator[tuple[str, Any]]:
    """SQuAD's own layout: articles, paragraphs, questions. Unanswerable ones get no answer."""
    try:
        articles = json.loads(_bytes(path))["data"]
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        asked = [(paragraph["context"], qa) for paragraph in paragraphs for qa in paragraph["qas"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not SQuAD's JSON ('data', 'paragraphs', 'qas'): "
            f"{type(error).__name__} {error}"
        ) from None
    for number, (context, qa) in enumerate(asked, start=1):
        place = f"question {qa.get('id', number) if isinstance(qa, dict) else number}"
        try:
            impossible, found = qa.get("is_impossible", not qa["answers"]), qa["answers"]
            answers = {key: [a[key] for a in found] for key in ("text", "answer_start")}
            row = {"question": qa["question"], "context": context, "answers": answers}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, {place}: expected 'question' and a list of 'answers' with "
                f"'text' and 'answer_start' ({error})"
            ) from None
        if bool(impossible) == bool(found):
            said = "has answers" if found else "has no answer"
            raise UserError(f"{path}, {place}: is_impossible={impossible}, but it {said}")
        yield place, row


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException, BufferReader
    from pyarrow.parquet import ParquetFile

    try:  # a path instead of its bytes could bring columns from folders named "label=1"
        rows = ParquetFile(BufferReader(_bytes(path))).read().to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a parquet file: {reason}") from None
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _problem(row: Any, task: Task) -> str:
    """What is wrong with one example, or nothing."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for name in task.columns:
        if name not in row:
            return f"no column '{name}'; {nearest(name, row)}"
    for name in task.fields:
        if not isinstance(row[name], str) or re.search("[\ud800-\udfff]", row[name]):
            return f"column '{name}' is {ascii(row[name])[:60]}; expected text"
    if task.kind == "span":
        return _answers_problem(row, task)
    return _label_problem(row["label"], task)


def _label_problem(label: Any, task: Task) -> str:
    number = isinstance(label, int | float) and not isinstance(label, bool)
    allowed = range(len(task.labels))
    if number and (label in allowed if task.labels else 0 <= label <= 5):
        return ""
    names = ", ".join(f"{index} {name}" for index, name in enumerate(task.labels))
    return f"label {ascii(label)[:60]}; expected {names or '0 to 5'}"


def _answers_problem(row: dict[str, Any], task: Task) -> str:
    """Each answer must stand in the context where its ``answer_start`` says."""
    answers, context = row["answers"], row["context"]
    try:
        lists = answers["text"], answers["answer_start"]
        pairs = list(zip(*lists, strict=True))
        wrong = [text for text, at in pairs if at < 0 or not context.startswith(text, at)]
        fit = {list} == {*map(type, lists)} and {int} >= {type(at) for _, at in pairs}
    except (TypeError, KeyError, ValueError):
        fit = False
    if not fit:
        return (
            f"answers {ascii(answers)[:60]}; expected lists 'text' and 'answer_start' of equal "
            "length"
        )
    if not row["question"].strip():
        return "the question is empty"
    if not all(text for text, _ in pairs):
        return "an answer is empty; a question without an answer has empty lists"
    if not pairs and task.name != "squad_v2":
        return f"no answer; only squad_v2 has questions without one, not {task.name}"
    return f"answer {wrong[0]!r} is not at its answer_start in the context" if wrong else ""
