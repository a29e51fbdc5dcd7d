"""The experiment on a folder of another family, with its own tokenizer, at scale smoke."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from moebert_lib.config.errors import UserError
from moebert_lib.config.settings import Settings
from moebert_lib.data import builtin_corpus, tasks
from moebert_lib.experiments import dataset
from moebert_lib.experiments import student as experiment
from moebert_lib.experiments import teacher as teachers
from moebert_lib.experiments.dataset import fine_tuned_model, new_model
from moebert_lib.method import encoder_layouts
from moebert_lib.model.accelerate import PackedEncoder, accelerate_if_exact
from moebert_lib.model.modeling import MoEHead
from moebert_lib.publish import share_model
from moebert_lib.store.store import Store
from moebert_lib.training.evaluation import predict

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def tokenizer(kind):
    """Trained on the sentences of the built-in tasks: WordPiece, or BPE on bytes."""
    pieces = kind == "distilbert"
    model = models.WordPiece(unk_token="<unk>") if pieces else models.BPE()
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace() if pieces else pre_tokenizers.ByteLevel()
    options = dict(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    trainer = trainers.WordPieceTrainer if pieces else trainers.BpeTrainer
    texts = [sentence.text for sentence in builtin_corpus.sentences(files_per_package=1)]
    made.train_from_iterator(texts, trainer(**options))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(params=["roberta", "mpnet", "distilbert"])
def folder(request, tmp_path, moebert_home):
    """A random encoder and its tokenizer, saved; nothing of another test in memory."""
    for cached in (teachers._teacher, teachers._importance, dataset._dataset):
        cached.cache_clear()
    own = tokenizer(request.param)
    size = dict(vocab_size=len(own), pad_token_id=1, max_position_embeddings=24)
    layers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    if request.param == "roberta":
        model = RobertaModel(RobertaConfig(**size, **layers, type_vocab_size=1))
    elif request.param == "mpnet":
        model = MPNetModel(MPNetConfig(**size, **layers))
    else:
        sizes = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64)
        model = DistilBertModel(DistilBertConfig(**size, **sizes))
    model.save_pretrained(tmp_path / request.param)
    own.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_it_is_shipped_with_a_receipt_whose_checks_hold(folder, tmp_path):
    made = share_model.from_task(Store(), "", Settings.at("smoke", model=str(folder)), train=False)
    (tmp_path / "moe").mkdir()
    results = share_model.write(made, tmp_path / "moe", name="moe")
    assert len(results) >= 6 and all(result.holds for result in results)
    assert any("accelerated" in result.claim for result in results)
    assert (tmp_path / "moe" / "model.safetensors").is_file()


def test_more_tokens_than_it_has_positions_for_are_refused(folder, tmp_path):
    longest = {"roberta": 22, "mpnet": 22}.get(folder.name, 24)  # of 24 embeddings
    settings = Settings.at("smoke", model=str(folder), max_length=longest)
    new_model(settings, tasks.TASKS["library"]).save_pretrained(tmp_path / "tuned")
    tuned = settings.but(model=str(tmp_path / "tuned"))
    assert encoder_layouts.longest(fine_tuned_model(tuned)) == longest
    with pytest.raises(UserError, match=f"{longest + 1}: the model takes at most {longest} tok"):
        fine_tuned_model(tuned.but(max_length=longest + 1))


def test_a_student_of_another_family_is_distilled_and_read_back(folder):
    settings = Settings.at("smoke", model=str(folder), routing="hash-balance", n_experts=2)
    encoder_layouts.check(settings)
    student = experiment.student(Store(), settings, keep_model=True)
    teacher, model = teachers.teacher(Store(), settings).model, student.model()
    assert teacher.config.model_type == folder.name and isinstance(model, MoEHead)
    assert model.config.model_type == "moe" + folder.name and model.config.expert_size == 32
    assert 0 < student.row["effective_parameters"] < student.row["stored_parameters"]
    assert student.curve.notna().all(axis=None) and (student.curve["hidden"] > 0).all()
    assert len(student.distances) == 3
    bundle = dataset.dataset(settings)
    one, many = (predict(model, bundle.batches("validation", batch_size=n)) for n in (1, 48))
    assert abs(one - many).max() < 1e-5  # padding changes no logit
    assert teachers.evaluate(settings, model)["accuracy"] == student.row["accuracy"]
    said = pipeline("text-classification", model=model, tokenizer=bundle.tokenizer)("a sentence")
    assert said[0]["label"] in bundle.task.labels


def test_dropout_is_set_everywhere_and_training_is_accelerated(folder):
    settings = Settings.at("smoke", model=str(folder), dropout=0.25)
    model = new_model(settings, tasks.TASKS["library"])
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25} and isinstance(accelerate_if_exact(model).base_model, PackedEncoder)


def test_a_model_that_cannot_be_converted_is_refused_before_anything_runs(folder, tmp_path):
    with pytest.raises(UserError, match="the largest expert_size that fits is"):
        encoder_layouts.check(Settings.at("smoke", model=str(folder), expert_size=65))
    other = tmp_path / "gpt2"
    GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)).save_pretrained(other)
    known = (
        "type 'gpt2' cannot be converted; supported: BERT, MiniLM, RoBERTa, ELECTRA, MPNet, Distil"
    )
    with pytest.raises(UserError, match=known):
        encoder_layouts.check(Settings.at("smoke", model=str(other)))
    with pytest.raises(ValueError, match=known):
        new_model(Settings.at("smoke", model=str(other)), tasks.TASKS["library"])
