"""What the paper prints: MoEBERT (Zuo et al., NAACL 2022, arXiv 2204.07675v2).

The only place in the project with the paper's numbers, each with its table or figure.
Scores are percentages and means over three runs; the paper gives no spread. Tables are
copied from the text. Figures carry no printed values, so theirs were read off the bitmap.
"""

from typing import Any

import pandas as pd

PRINTED = "printed in the paper"
DIGITISED = "digitised from the PDF's bitmap"
PROVENANCE = f"Tables: {PRINTED}; mean of three runs, no spread given. Figures: {DIGITISED}."

_NONE = float("nan")  # the paper prints a dash

_SETTING_NAMES = (
    "learning_rate",
    "batch_size",
    "epochs",
    "weight_decay",
    "distill_weight",
    "max_length",
)

#: Table 7, printed: hyper-parameters for distilling BERT-base, by task, under the names of
#: the fields of Settings. The batch size is over all GPUs ("8 x 8" is 64).
TABLE7: dict[str, dict[str, Any]] = {
    task: dict(zip(_SETTING_NAMES, values, strict=True))
    for task, values in {
        "rte": (1e-5, 8, 10.0, 0.01, 1.0, 512),
        "cola": (2e-5, 8, 10.0, 0.0, 3.0, 512),
        "mrpc": (3e-5, 8, 5.0, 0.0, 2.0, 512),
        "sst2": (2e-5, 16, 5.0, 0.0, 1.0, 512),
        "qnli": (2e-5, 32, 5.0, 0.0, 2.0, 512),
        "qqp": (3e-5, 64, 5.0, 0.0, 1.0, 128),
        "mnli": (5e-5, 64, 5.0, 0.0, 5.0, 128),
        "squad": (3e-5, 32, 5.0, 0.01, 2.0, 384),
        "squad_v2": (3e-5, 16, 4.0, 0.1, 1.0, 384),
    }.items()
}

# Table 1, printed: GLUE development sets. Task, metric -> column, in the paper's order.
_TABLE1_COLUMNS = {
    ("rte", "accuracy"): "RTE Acc",
    ("cola", "matthews"): "CoLA Mcc",
    ("mrpc", "f1"): "MRPC F1",
    ("mrpc", "accuracy"): "MRPC Acc",
    ("sst2", "accuracy"): "SST-2 Acc",
    ("qnli", "accuracy"): "QNLI Acc",
    ("qqp", "f1"): "QQP F1",
    ("qqp", "accuracy"): "QQP Acc",
    ("mnli", "accuracy"): "MNLI m",
    ("mnli", "accuracy_mismatched"): "MNLI mm",
}
_TABLE1 = {
    "BERT-base": (63.5, 54.7, 89.0, 84.1, 92.9, 91.1, 88.3, 90.9, 84.5, 84.4),
    "DistilBERT": (59.9, 51.3, 87.5, _NONE, 92.7, 89.2, _NONE, 88.5, 82.2, _NONE),
    "TinyBERT (w/o aug)": (72.2, 42.8, 88.4, _NONE, 91.6, 90.5, _NONE, 90.6, 83.5, _NONE),
    "MiniLMv1": (71.5, 49.2, 88.4, _NONE, 92.0, 91.0, _NONE, 91.0, 84.0, _NONE),
    "MiniLMv2": (72.1, 52.5, 88.9, _NONE, 92.4, 90.8, _NONE, 91.1, 84.2, _NONE),
    "CoDIR (pre+fine)": (67.1, 53.7, 89.6, _NONE, 93.6, 90.1, _NONE, 89.1, 83.5, 82.7),
    "PKD": (65.5, 24.8, 86.4, _NONE, 92.0, 89.0, _NONE, 88.9, 81.5, 81.0),
    "BERT-of-Theseus": (68.2, 51.1, 89.0, _NONE, 91.5, 89.5, _NONE, 89.6, 82.3, _NONE),
    "CoDIR (fine)": (65.6, 53.6, 89.4, _NONE, 93.6, 90.4, _NONE, 89.1, 83.6, 82.8),
    "MoEBERT": (74.0, 55.4, 92.6, 89.5, 93.0, 91.3, 88.4, 91.4, 84.5, 84.8),
}

# Table 2, printed: SQuAD development sets.
_TABLE2_COLUMNS = {
    ("squad", "exact_match"): "v1.1 EM",
    ("squad", "f1"): "v1.1 F1",
    ("squad_v2", "exact_match"): "v2.0 EM",
    ("squad_v2", "f1"): "v2.0 F1",
}
_TABLE2 = {
    "BERT-base": (80.7, 88.4, 74.5, 77.7),
    "DistilBERT": (78.1, 86.2, 66.0, 69.5),
    "TinyBERT (w/o aug)": (_NONE, _NONE, _NONE, 73.1),
    "MiniLMv1": (_NONE, _NONE, _NONE, 76.4),
    "MiniLMv2": (_NONE, _NONE, _NONE, 76.3),
    "PKD": (77.1, 85.3, 66.3, 69.8),
    "MoEBERT": (80.4, 87.9, 73.6, 76.8),
}

# Table 3, printed: layer-wise distillation left out.
_TABLE3_COLUMNS = {
    ("rte", "accuracy"): "RTE Acc",
    ("mnli", "accuracy"): "MNLI m",
    ("mnli", "accuracy_mismatched"): "MNLI mm",
    ("squad_v2", "exact_match"): "SQuAD v2.0 EM",
    ("squad_v2", "f1"): "SQuAD v2.0 F1",
}
_TABLE3 = {
    "MoEBERT": (74.0, 84.5, 84.8, 73.6, 76.8),
    "-distill": (73.3, 83.2, 84.0, 72.5, 76.0),
}

# Table 4, printed: distilling BERT-large (FFN 4096 -> 4 experts of 1024, 512 shared).
_TABLE4_COLUMNS = {
    ("rte", "accuracy"): "RTE",
    ("mnli", "accuracy"): "MNLI-m",
    ("mnli", "accuracy_mismatched"): "MNLI-mm",
}
_TABLE4 = {"BERT-large": (71.1, 86.3, 86.2), "MoEBERT-large": (72.2, 86.3, 86.5)}

#: Tables 5 and 6, printed: examples to train on and in the development set; Table 6 rounds.
TABLE5 = {"squad": (87_599, 10_570), "squad_v2": (130_319, 11_873)}
TABLE6 = {
    "cola": (8_500, 1_000),
    "sst2": (67_000, 872),
    "mnli": (393_000, 20_000),
    "rte": (2_500, 276),
    "qqp": (364_000, 40_000),
    "mrpc": (3_700, 408),
    "qnli": (108_000, 5_700),
    "stsb": (7_000, 1_500),
}

_COLUMNS = {1: _TABLE1_COLUMNS, 2: _TABLE2_COLUMNS, 3: _TABLE3_COLUMNS, 4: _TABLE4_COLUMNS}

#: Values read off the figures (DIGITISED). Keys are the values of the matching setting.
#: Figures 2 and 3: mean of MNLI-m and MNLI-mm accuracy, %. Figure 4: examples a second.
#: Where a figure varies one thing, the rest is 4 experts of 768 neurons, 512 shared.
FIGURES: dict[str, dict[str | int, float]] = {
    "figure2a": {128: 83.38, 384: 84.36, 768: 84.70, 1536: 84.90},
    "figure2b": {1: 84.20, 2: 84.65, 4: 84.70, 8: 84.76},
    "figure2c": {0: 84.03, 256: 84.60, 512: 84.70, 768: 84.30},
    "figure3a": {"importance": 84.70, "random": 83.78, "inverse": 83.13},
    "figure3b": {"all": 84.60, "skip": 84.51, "last": 84.25},
    "figure3c": {"hash-random": 84.70, "hash-balance": 84.67, "gate-sentence": 84.76},
    "figure4": {"BERT": 7.47, "MoEBERT": 13.76, "DistilBERT": 14.32},
}

#: Figure 4 as speed over BERT, by the variant of ``bench`` that has the model's shape.
SPEEDUPS = {
    "half depth": FIGURES["figure4"]["DistilBERT"] / FIGURES["figure4"]["BERT"],
    "moebert gate-sentence": FIGURES["figure4"]["MoEBERT"] / FIGURES["figure4"]["BERT"],
}

#: The field of Settings that each figure varies.
FIGURE_SETTINGS = {
    "figure2a": "expert_size",
    "figure2b": "n_experts",
    "figure2c": "n_shared",
    "figure3a": "ranking",
    "figure3b": "distill",
    "figure3c": "routing",
}

#: The value of that setting in the paper's default configuration.
DEFAULTS = {
    "figure2a": 768,
    "figure2b": 4,
    "figure2c": 512,
    "figure3a": "importance",
    "figure3b": "all",
    "figure3c": "hash-random",
}

#: What the horizontal axis of each figure says.
FIGURE_AXES = {
    "figure2a": "expert size, neurons",
    "figure2b": "number of experts",
    "figure2c": "shared neurons",
    "figure3a": "how neurons are dealt",
    "figure3b": "layers distilled",
    "figure3c": "routing",
    "figure4": "examples a second (SST-2, CPU, batch of 1, 128 tokens)",
}

#: What the paper claims from each figure, in our words.
CLAIMS = {
    "figure2a": "Larger experts are better.",
    "figure2b": "More experts are better; one alone is not enough.",
    "figure2c": "Sharing no neuron is worst; sharing all of them is poor too.",
    "figure3a": "Importance beats a random split by far, and random beats inverse.",
    "figure3b": "The last layer alone is poor; every other layer is about as good as all.",
    "figure3c": "The routers are about equal, so MoEBERT does not hang on the router.",
    "figure4": "Far faster than BERT, a little slower than DistilBERT.",
    "table3": "Without layer-wise distillation accuracy falls on every task.",
}


def table(n: int) -> pd.DataFrame:
    """Table ``n`` of the paper, as numbers.

    Args:
        n: 1 (GLUE), 2 (SQuAD), 3 (no distillation), 4 (BERT-large) or 7
            (hyper-parameters).

    Returns:
        One row per method (Table 7: per task), one column per metric in %, NaN where the
        paper prints a dash. A cell printed "92.6/89.5" fills two columns.

    Raises:
        ValueError: the paper has no such table of numbers.

    Example:
        >>> table(1).loc["MoEBERT", "RTE Acc"]
        np.float64(74.0)
    """
    tables = {
        1: (_TABLE1, list(_TABLE1_COLUMNS.values()), "method"),
        2: (_TABLE2, list(_TABLE2_COLUMNS.values()), "method"),
        3: (_TABLE3, list(_TABLE3_COLUMNS.values()), "method"),
        4: (_TABLE4, list(_TABLE4_COLUMNS.values()), "method"),
        7: ({k: tuple(v.values()) for k, v in TABLE7.items()}, list(_SETTING_NAMES), "task"),
    }
    if n not in tables:
        raise ValueError(f"no Table {n} here; choose from {', '.join(map(str, tables))}")
    rows, columns, index = tables[n]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    frame.index.name = index
    return frame


def figure(name: str) -> pd.DataFrame:
    """A figure's values as rows, to stand below ours in a saved table.

    Args:
        name: ``figure2a`` to ``figure3c``.

    Returns:
        The setting that the figure varies, ``source``, and ``paper_percent``: accuracy on MNLI.

    Example:
        >>> figure("figure2c")["paper_percent"].max()
        np.float64(84.7)
    """
    values = pd.Series(FIGURES[name], name="paper_percent").rename_axis(FIGURE_SETTINGS[name])
    return values.reset_index().assign(source="paper")


def moebert(task: str) -> dict[str, float]:
    """MoEBERT's scores on a task, in %: Table 1 (GLUE) or Table 2 (SQuAD).

    Returns:
        Metric to value; empty where the paper has no number, as for a built-in task.

    Example:
        >>> moebert("mrpc")
        {'f1': 92.6, 'accuracy': 89.5}
    """
    return _scores("MoEBERT", task)


def bert_base(task: str) -> dict[str, float]:
    """Dense BERT-base's scores on a task, in %; see :func:`moebert`."""
    return _scores("BERT-base", task)


#: One configuration, the default, as two figures show it: a lower bound of the paper's noise.
DEFAULT_TWICE = (FIGURES["figure3b"]["all"], FIGURES["figure3a"]["importance"])
NOISE_FLOOR = DEFAULT_TWICE[1] - DEFAULT_TWICE[0]


def column(task: str, metric: str, *, table: int | None = None) -> str:
    """Name of a task's metric among the columns of a table; empty where there is none.

    Args:
        task: A task.
        metric: One of its metrics.
        table: 1 to 4; None for the one of Tables 1 (GLUE) and 2 (SQuAD) that has the task.

    Example:
        >>> column("mnli", "accuracy"), column("library", "accuracy")
        ('MNLI m', '')
    """
    columns = _COLUMNS[table] if table else {**_TABLE1_COLUMNS, **_TABLE2_COLUMNS}
    return columns.get((task, metric), "")


def printed(method: str, task: str, metric: str) -> float:
    """One cell of Tables 1 to 4 in %; NaN where the paper has none.

    Args:
        method: ``MoEBERT``, ``BERT-base``, ``-distill``, ``MoEBERT-large``, or any other row.
        task: A task.
        metric: One of its metrics.

    Example:
        >>> printed("-distill", "squad_v2", "f1"), printed("MoEBERT", "library", "accuracy")
        (76.0, nan)
    """
    for n in _COLUMNS:
        rows, name = table(n), column(task, metric, table=n)
        if method in rows.index and name:
            return float(rows.loc[method, name])
    return _NONE


def _scores(method: str, task: str) -> dict[str, float]:
    columns = {**_TABLE1_COLUMNS, **_TABLE2_COLUMNS}
    rows = {**dict(zip(_TABLE1_COLUMNS, _TABLE1[method], strict=True))}
    rows |= dict(zip(_TABLE2_COLUMNS, _TABLE2[method], strict=True))
    return {metric: rows[name, metric] for name, metric in columns if name == task}
