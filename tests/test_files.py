import json
import os
from pathlib import Path

import pandas as pd
import pytest

from moebert_lib.config import provenance
from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data import loading
from moebert_lib.data.tasks import TASKS
from moebert_lib.experiments import dataset

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
    counts = loading.check_files(TASKS[task], str(tiny_glue))
    assert counts.pop("train") == 64 and {*counts.values()} == {32}
    assert counts.keys() == {"validation", *dict(TASKS[task].also)}


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
        ('{"sentence": "a", "label": 1e999}', "label inf; expected 0"),
        (f'{{"sentence": "a", "label": {"1" + "0" * 400}}}', "label 1000"),
        (f'{{"sentence": "a", "label": {"9" * 5000}}}', "line 1: not a JSON object"),
        ('{"sentence": "a", "label": 0, "label": 1}', "in which each name occurs once"),
        ('{"sentence": "\\ud800", "label": 0}', "column 'sentence' is '\\ud800'"),
        ("[" * 10**5, "line 1: not a JSON object"),
        ("\x00", "line 1: not a JSON object"),
        ("\n \n", "train.jsonl is empty"),
    ],
)
def test_a_bad_example_is_refused_with_file_line_and_reason(lines, message, tmp_path):
    data_dir = put(tmp_path, train=lines, validation=json.dumps(GOOD))
    said = refusal(data_dir)
    assert f"{tmp_path}/sst2/train.jsonl" in said and message in said


@pytest.mark.parametrize("between", ["\n", "\r\n", "\n\n", " \n\t\n"])
def test_blank_lines_do_not_count_and_places_are_those_of_the_file(tmp_path, between):
    lines = between.join([json.dumps(GOOD)] * 3) + between
    data_dir = put(tmp_path, train=lines, validation=lines)
    assert loading.check_files(TASKS["sst2"], data_dir) == {"train": 3, "validation": 3}
    place = (lines + "[1]").split("\n").index("[1]") + 1
    (tmp_path / "sst2" / "train.jsonl").write_text(lines + "[1]")
    assert f"line {place}: not a JSON object" in refusal(data_dir)


def some(**changes):
    return Settings.at("small", task="sst2", subsample="position", **changes)


@pytest.mark.parametrize("name", ["glue[12]", "glue*", "~glue", "label=1", "g{1,2}", "a b%20c"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "shards"])
def test_a_folders_name_is_never_a_pattern(tmp_path, name, ending, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, folder in enumerate([name, "glue1", "glue2", "gluex", "g1"]):
        if ending == "jsonl":
            (tmp_path / folder).mkdir()
            put(tmp_path / folder, **dict.fromkeys(("train", "validation"), one_line(n)))
        else:
            (tmp_path / folder / "sst2").mkdir(parents=True)
            shard = "-00000-of-00001" if ending == "shards" else ""
            for split in ("train", "validation"):
                rows = pd.DataFrame([json.loads(one_line(n))])
                rows.to_parquet(tmp_path / folder / "sst2" / f"{split}{shard}.parquet")
    loaded = loading.load(some(data_dir=str(tmp_path / name)))
    assert loaded.train.to_list() == [{"sentence": "number 0", "label": 0}]


def one_line(n):
    return json.dumps({"sentence": f"number {n}", "label": 0})


def test_a_file_rewritten_with_its_old_time_stamp_gives_its_new_rows(tmp_path):
    """Of the same size as well, again and again, in one process; and its digest is a new one."""
    data_dir = put(tmp_path, train=one_line(0), validation=one_line(0))
    path = tmp_path / "sst2" / "train.jsonl"
    old, digests = path.stat(), set()
    for n in range(5):
        path.write_text(one_line(n))
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        settings = some(data_dir=data_dir)
        assert loading.load(settings).train["sentence"][:] == [f"number {n}"]
        assert dataset.dataset(settings.but(model="tiny")).examples["train"]["sentence"][:] == [
            f"number {n}"
        ]
        digests.add(loading.digest(settings))
    assert len(digests) == 5


def test_a_digest_is_computed_once_and_again_after_a_change_that_hides_itself(
    tmp_path, monkeypatch
):
    path = tmp_path / "file"
    path.write_text("one")
    stat = path.stat()
    monkeypatch.setattr(provenance, "JUST_NOW", 0)  # as if the file were older
    read = []
    plain = provenance.file_digest
    monkeypatch.setattr(provenance, "file_digest", lambda p: read.append(p) or plain(p))
    assert provenance.input_digest(path) == provenance.input_digest(path) == plain(path)
    assert len(read) == 1
    other = tmp_path / "other"
    other.write_text("two")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert provenance.input_digest(path) == plain(path) and len(read) == 2


TEXTS = ["2020-01-01", "1", "true", "null", "NaN", "", " a ", "\u2028", "é", "\x00", "1e5", "[]"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_every_text_stays_what_it_is(tmp_path, ending):
    """A reader that guesses types makes dates of the first, numbers of the second."""
    rows = [{"sentence": text, "label": n % 2} for n, text in enumerate(TEXTS)]
    data_dir = put(tmp_path, validation=one_line(0))
    if ending == "jsonl":
        (tmp_path / "sst2" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pd.DataFrame(rows).to_parquet(tmp_path / "sst2" / "train.parquet")
    assert loading.load(some(data_dir=data_dir)).train.to_list() == rows


def test_a_missing_shard_is_named(tmp_path):
    put(tmp_path, validation=one_line(0))
    for n in (0, 2):
        shard = tmp_path / "sst2" / f"train-0000{n}-of-00003.parquet"
        pd.DataFrame([GOOD]).to_parquet(shard)
    assert "2 shards of 'train', the last train-00002-of-00003.parquet" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["~nobody-of-this-name/x", "a\0b", "x" * 5000])
def test_a_folder_that_cannot_be_is_one_line(where):
    assert refusal(where).startswith("no data folder")


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    put(tmp_path, validation=one_line(0))
    (tmp_path / "sst2" / "train.jsonl").symlink_to("/proc/self/mem")
    assert "train.jsonl" in refusal(tmp_path)


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
        ({"answers": [{"text": "Ada", "answer_start": False}]}, "expected lists 'text' and"),
        ({"answers": [{"text": "Ada", "answer_start": 0.0}]}, "expected lists 'text' and"),
        ({"answers": [{"text": 3, "answer_start": 0}]}, "expected lists 'text' and"),
    ],
)
def test_a_question_that_contradicts_itself_is_named(tmp_path, qa, said):
    assert said in refusal(nested(tmp_path, **qa), "squad_v2")


def test_squads_first_version_has_an_answer_to_every_question(tmp_path):
    folder = Path(nested(tmp_path, answers=[])) / "squad_v2"
    folder.rename(tmp_path / "squad")
    assert "only squad_v2 has questions without one" in refusal(tmp_path, "squad")
