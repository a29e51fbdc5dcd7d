import json

import datasets
import glue_files
import pytest
import torch
from transformers import AutoTokenizer

from moebert_lib.config.errors import UserError
from moebert_lib.config.presets import MINILM
from moebert_lib.config.settings import Settings
from moebert_lib.data import batching, loading, pretrained_weights, tasks

BUILT_IN = [name for name, task in tasks.TASKS.items() if task.source == "built-in"]
FROM_FILES = [name for name, task in tasks.TASKS.items() if task.source != "built-in"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained_weights.find(MINILM))


@pytest.fixture(scope="module")
def encoded(tokenizer):
    loaded = loading.load(Settings.at("smoke", task="follows"))
    return loading.encode(loaded.train, loaded.task, tokenizer, 32)


def glue_settings(task, folder, **changes):
    return Settings.at("small", task=task, data_dir=str(folder), **changes)


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="^unknown task 'sst-2'; did you mean 'sst2'?"):
        loading.check(Settings.at("quick", task="sst-2"))


@pytest.mark.parametrize("scale", ["smoke", "quick"])
def test_an_offline_scale_refuses_a_glue_task_without_files(scale):
    with pytest.raises(UserError, match=r"'rte' needs a data_dir DIR with DIR/rte/train.jsonl at"):
        loading.check(Settings.at(scale, task="rte"))
    assert loading.check(Settings.at("small", task="rte")) is None


def test_a_folder_without_data_is_refused_whatever_the_task(tmp_path):
    for task in ("library", "rte"):
        with pytest.raises(UserError, match=str(tmp_path)):
            loading.check(Settings.at("quick", task=task, data_dir=str(tmp_path)))


@pytest.mark.parametrize("task", BUILT_IN)
def test_a_built_in_task_loads_offline(task):
    loaded = loading.load(Settings.at("smoke", task=task))
    assert 50 < len(loaded.train) <= 64 and 10 < len(loaded.validation) <= 48
    assert loaded.train.column_names == [*loaded.task.columns]


@pytest.mark.parametrize("task", FROM_FILES)
def test_a_task_loads_from_files(task, tiny_glue):
    loaded = loading.load(glue_settings(task, tiny_glue))
    assert loaded.train.column_names == [*loaded.task.columns]
    assert len(loaded.train) == 64 and len(loaded.validation) == 32


def test_mnli_is_validated_on_the_matched_set(tiny_glue):
    lines = (tiny_glue / "mnli" / "validation_matched.jsonl").read_text().splitlines()
    loaded = loading.load(glue_settings("mnli", tiny_glue, subsample="position"))
    assert loaded.validation["premise"][:] == [json.loads(line)["premise"] for line in lines]
    other = (tiny_glue / "mnli" / "validation_mismatched.jsonl").read_text().splitlines()
    mismatched = loaded.also["mismatched"]["premise"][:]
    assert mismatched == [json.loads(line)["premise"] for line in other] != lines


def test_squads_own_nested_file_gives_the_same_as_jsonl(tiny_glue, tmp_path):
    flat = loading.load(glue_settings("squad_v2", tiny_glue))
    folder = tmp_path / "squad_v2"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = getattr(flat, split)
        (folder / f"{split}.json").write_text(json.dumps(glue_files.nested(rows)))
    again = loading.load(glue_settings("squad_v2", tmp_path))
    assert again.train.to_dict() == flat.train.to_dict()
    assert [] in [answers["text"] for answers in again.validation["answers"]]


def test_real_files_load(data_dir):
    loaded = loading.load(glue_settings("sst2", data_dir, max_train_examples=40))
    assert len(loaded.train) == 40 and set(loaded.validation["label"]) == {0, 1}


def test_parquet_gives_the_same_as_jsonl(tiny_glue, tmp_path):
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_json(str(tiny_glue / "rte" / f"{split}.jsonl"))
        rows.to_parquet(tmp_path / "rte" / f"{split}.parquet")
    first, again = (loading.load(glue_settings("rte", folder)) for folder in (tiny_glue, tmp_path))
    assert first.train.to_dict() == again.train.to_dict()


@pytest.mark.parametrize("task", ["cola", "mnli", "squad", "squad_v2"])
def test_the_hub_is_asked_for_a_pinned_revision_and_gives_what_files_give(
    monkeypatch, tiny_glue, task
):
    def hub(name, *part, split, revision):
        asked.append((name, *part, split, revision))
        return datasets.Dataset.from_json(str(tiny_glue / task / f"{split}.jsonl"))

    asked = []
    from_files = loading.load(glue_settings(task, tiny_glue))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    loaded = loading.load(Settings.at("small", task=task))
    name, revision = loading.HUB[task if task.startswith("squad") else "glue"]
    part = [] if task.startswith("squad") else [task]
    splits = loading.splits(tasks.TASKS[task]).values()
    assert asked == [(name, *part, split, revision) for split in splits]
    assert len(revision) == 40
    assert loaded.validation.to_dict() == from_files.validation.to_dict()
    assert {k: v.to_dict() for k, v in loaded.also.items()} == {
        k: v.to_dict() for k, v in from_files.also.items()
    }


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(
        UserError, match=r"^nyu-mll/glue cannot be loaded \(.*; give --data-dir DIR"
    ):
        loading.load(Settings.at("small", task="cola"))


@pytest.mark.parametrize("subsample", ["hash", "position"])
def test_a_limit_takes_the_same_random_examples_whatever_the_seed(tiny_glue, subsample):
    def some(limit=20, **changes):
        asked = glue_settings("cola", tiny_glue, subsample=subsample, **changes)
        return loading.load(asked.but(max_train_examples=limit)).train["sentence"][:]

    whole = some(None)
    assert some(seed=1) == some(seed=2)
    assert len({*some()}) == 20 and {*some()} < {*whole}


def test_the_digest_follows_task_caps_and_files_but_not_seeds(tiny_glue, tmp_path):
    base = glue_settings("cola", tiny_glue)
    assert loading.digest(base) == loading.digest(base.but(seed=5)) == loading.load(base).digest
    others = [base.but(task="sst2"), base.but(max_train_examples=9), Settings.at("small")]
    others += [base.but(subsample="position"), base.but(second_test=9)]
    (tmp_path / "cola").mkdir()
    for path in (tiny_glue / "cola").iterdir():
        (tmp_path / "cola" / path.name).write_bytes(path.read_bytes() + b"\n")
    others.append(glue_settings("cola", tmp_path))
    assert len({loading.digest(settings) for settings in [base, *others]}) == 7


def test_encoding_keeps_pairs_apart_and_cuts_at_max_length(encoded, tokenizer):
    row = encoded[encoded["length"].index(max(encoded["length"]))]
    assert row["length"] == len(row["input_ids"]) == len(row["token_type_ids"]) == 32
    assert row["input_ids"].count(tokenizer.sep_token_id) == 2 and set(row["token_type_ids"]) == {
        0,
        1,
    }
    assert set(row) == {"input_ids", "attention_mask", "token_type_ids", "length", "labels"}


def test_regression_labels_are_encoded_as_floats(tokenizer, tiny_glue):
    loaded = loading.load(glue_settings("stsb", tiny_glue))
    coded = loading.encode(loaded.train, loaded.task, tokenizer, 16)
    assert coded["labels"][:] == loaded.train["label"][:] and 0.5 in coded["labels"][:]
    assert next(batching.batches(coded, tokenizer, 4))["labels"].dtype == torch.float32


@pytest.mark.parametrize("sort", [True, False])
def test_every_example_is_in_one_batch_with_its_own_label(encoded, tokenizer, sort):
    seen = []
    for batch in batching.batches(encoded, tokenizer, 7, sort=sort):
        for place, index in enumerate(batch["index"].tolist()):
            length = int(batch["attention_mask"][place].sum())
            assert batch["input_ids"][place, :length].tolist() == encoded[index]["input_ids"]
            assert (batch["input_ids"][place, length:] == tokenizer.pad_token_id).all()
            assert batch["labels"][place] == encoded[index]["labels"]
            seen.append(index)
    assert sorted(seen) == list(range(64)) and (sort or seen == sorted(seen))


def test_a_budget_of_tokens_decides_the_batches_instead_of_a_number(encoded, tokenizer):
    seen, sizes = [], []
    for batch in batching.batches(encoded, tokenizer, 1, max_tokens=100):
        seen += batch["index"].tolist()
        sizes.append(int(batch["attention_mask"].sum()))
    assert sorted(seen) == list(range(64)) and max(sizes) <= 100
    longest = max(encoded["length"])
    assert min(sizes[:-1]) > 100 - longest  # no room is left for another


def test_sorted_batches_hold_less_padding(encoded, tokenizer):
    def size(sort):
        return sum(
            b["input_ids"].numel() for b in batching.batches(encoded, tokenizer, 8, sort=sort)
        )

    assert sum(encoded["length"]) <= size(True) < size(False)


def test_labels_may_be_absent(encoded, tokenizer):
    batch = next(batching.batches(encoded.remove_columns("labels"), tokenizer, 4))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "index"}
