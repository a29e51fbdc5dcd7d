import json
from pathlib import Path

import pandas as pd
import pytest

from moebert_lib.config.errors import UserError
from moebert_lib.data import loading
from moebert_lib.data.tasks import TASKS

GOOD = {"sentence": "a fine film", "label": 1, "idx": 0}


def put(folder: Path, **files: str) -> str:
    """Files of task sst2 by split; returns the data folder."""
    (folder / "sst2").mkdir()
    for split, text in files.items():
        (folder / "sst2" / f"{split}.jsonl").write_text(text)
    return str(folder)


def refusal(data_dir, task="sst2") -> str:
    with pytest.raises(UserError) as error:
        loading.check_files(TASKS[task], str(data_dir))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("task", [name for name in TASKS if TASKS[name].source != "built-in"])
def test_good_files_pass(task, tiny_glue):
    assert loading.check_files(TASKS[task], str(tiny_glue)) is None


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert refusal(tmp_path / "nowhere").startswith(f"no data folder {tmp_path}/nowhere; expected")


def test_a_missing_tasks_message_names_the_folders_that_are_there(tmp_path):
    assert refusal(tmp_path).endswith("it holds no folders")
    for name in ("rte", "mrpc"):
        (tmp_path / name).mkdir()
    assert refusal(tmp_path) == f"no folder 'sst2' in {tmp_path}; there are mrpc, rte"


def test_a_tasks_own_folder_given_for_the_one_above_is_recognised(tmp_path):
    put(tmp_path, train="")
    assert refusal(tmp_path / "sst2").endswith("give the folder above it")


def test_a_built_in_task_reads_no_files(tmp_path):
    assert "holds no task's folder, expected sst2/" in refusal(tmp_path, "library")
    put(tmp_path)
    found = f"task 'library' is built in and reads no files; choose one that is in {tmp_path}: sst2"
    assert refusal(tmp_path, "library") == found


def test_a_missing_split_is_named_beside_what_is_there(tmp_path):
    data_dir = put(tmp_path, train=json.dumps(GOOD), dev="")
    assert refusal(data_dir) == (
        f"no validation.jsonl or validation.parquet in {tmp_path}/sst2; there is dev.jsonl, "
        "train.jsonl"
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "train.jsonl is empty"),
        ("{'a': 1}", "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        ('{"Sentence": "a", "label": 0}', "no column 'sentence'; did you mean 'Sentence'?"),
        ('{"sentence": "a", "target": 0}', "no column 'label'; choose from sentence, target"),
        ('{"sentence": null, "label": 0}', "column 'sentence' is None; expected text"),
        ('{"sentence": "a", "label": 2}', "label 2; expected 0 negative, 1 positive"),
        ('{"sentence": "a", "label": -1}', "label -1; expected 0 negative, 1 positive"),
        ('{"sentence": "a", "label": 0.5}', "label 0.5; expected 0"),
        ('{"sentence": "a", "label": "1"}', "label '1'; expected 0"),
        ('{"sentence": "a", "label": true}', "label True; expected 0"),
        ('{"sentence": "a", "label": NaN}', "label nan; expected 0"),
    ],
)
def test_a_bad_example_is_refused_with_file_line_and_reason(lines, message, tmp_path):
    data_dir = put(tmp_path, train=lines, validation=json.dumps(GOOD))
    said = refusal(data_dir)
    assert f"{tmp_path}/sst2/train.jsonl" in said and message in said


def test_a_bad_last_line_is_found(tmp_path):
    lines = [json.dumps(GOOD)] * 3 + [json.dumps({**GOOD, "label": 9})]
    data_dir = put(tmp_path, train="\n".join(lines), validation=lines[0])
    assert "train.jsonl, line 4: label 9" in refusal(data_dir)


@pytest.mark.parametrize("label", [-0.1, 5.5, "3"])
def test_a_score_lies_between_0_and_5(label, tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": label}
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "train.jsonl").write_text(json.dumps(row))
    assert f"label {label!r}; expected 0 to 5" in refusal(tmp_path, "stsb")


def test_parquet_is_checked_like_jsonl(tmp_path):
    put(tmp_path, validation=json.dumps(GOOD))
    path = tmp_path / "sst2" / "train-00000-of-00001.parquet"
    pd.DataFrame([GOOD, {**GOOD, "label": 3}]).to_parquet(path)
    assert refusal(tmp_path).startswith(f"{path}, row 2: label 3; expected")
    path.write_bytes(b"not parquet")
    assert refusal(tmp_path).startswith(f"{path} is not a parquet file")


def test_a_file_that_changed_is_checked_again(tmp_path):
    data_dir = put(tmp_path, train=json.dumps(GOOD), validation=json.dumps(GOOD))
    loading.check_files(TASKS["sst2"], data_dir)
    (tmp_path / "sst2" / "train.jsonl").write_text("")
    assert "is empty" in refusal(data_dir)


def nested(tmp_path, **qa):
    folder = tmp_path / "squad_v2"
    folder.mkdir()
    one = {"id": "q7", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]} | qa
    one = {name: value for name, value in one.items() if value is not None}
    made = {"data": [{"paragraphs": [{"context": "Ada wrote.", "qas": [one]}]}]}
    for split in ("train", "validation"):
        (folder / f"{split}.json").write_text(json.dumps(made))
    return str(tmp_path)


@pytest.mark.parametrize(
    "qa, said",
    [
        ({"answers": None}, "question q7: expected 'question' and a list of 'answers'"),
        ({"answers": "Ada"}, "question q7: expected 'question' and a list of 'answers'"),
        ({"is_impossible": True}, "is_impossible=True, but it has answers"),
        ({"is_impossible": False, "answers": []}, "is_impossible=False, but it has no answer"),
        ({"question": " "}, "the question is empty"),
        ({"answers": [{"text": "", "answer_start": 0}]}, "an answer is empty"),
        ({"answers": [{"text": "Ada", "answer_start": 4}]}, "'Ada' is not at its answer_start"),
    ],
)
def test_a_question_that_contradicts_itself_is_named(tmp_path, qa, said):
    assert said in refusal(nested(tmp_path, **qa), "squad_v2")


def test_squads_first_version_has_an_answer_to_every_question(tmp_path):
    folder = Path(nested(tmp_path, answers=[])) / "squad_v2"
    folder.rename(tmp_path / "squad")
    assert "only squad_v2 has questions without one" in refusal(tmp_path, "squad")
