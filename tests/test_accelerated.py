"""An accelerated model in use: copied, saved, loaded, trained, in a pipeline, beside its origin."""

import copy
import io
import pickle

import pytest
import torch
from tiny_models import batch, dense, moebert
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    BertTokenizerFast,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from moebert_lib import accelerate

SMALL = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
INPUTS = batch([7, 12, 3, 7])
MODELS = {
    "dense": dense,
    "spans": lambda **k: dense(BertForQuestionAnswering, **k),
    "words": lambda **k: dense(BertForMaskedLM, **k),
    "bare": lambda **k: dense(BertModel, **k),
    "moebert": moebert,
    "gated": lambda **k: moebert(routing="gate-sentence", **k),
    "tied spans": lambda **k: moebert(spans=True, shared_neurons="tied", **k),
    "bare moebert": lambda **k: moebert(**k).bert,
}


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@torch.no_grad()
def answer(model, *, within=INPUTS):
    """First output, at real tokens if it has one a token."""
    first = model(**within)[0]
    mask = within["attention_mask"].bool()
    return first[mask] if first.shape[:2] == mask.shape else first.flatten(1)


def test_it_is_a_model_of_the_same_kind(make):
    model = make()
    faster = accelerate(model)
    assert isinstance(faster, PreTrainedModel) and isinstance(faster, type(model))
    assert type(faster).__name__ == type(model).__name__
    assert (faster.dtype, faster.device) == (model.dtype, model.device)
    assert faster.num_parameters() == model.num_parameters()
    assert faster.get_input_embeddings() is model.get_input_embeddings()


def test_its_state_is_the_ordinary_models_by_name_and_memory(make):
    model = make()
    one, other = model.state_dict(), accelerate(model).state_dict()
    assert [*one] == [*other]
    assert all(one[name].data_ptr() == other[name].data_ptr() for name in one)
    own = dict(accelerate(model).named_parameters())
    assert all(own[name] is values for name, values in model.named_parameters())


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_the_same_and_apart_from_it(make, copied):
    faster = accelerate(make())
    expected = answer(faster)  # also: something is kept before it is copied
    other = copied(faster)
    assert torch.equal(answer(other), expected)
    assert [*other.state_dict()] == [*faster.state_dict()]
    with torch.no_grad():
        for values in faster.parameters():
            values.mul_(1.5)
    assert torch.equal(answer(other), expected)
    assert not torch.allclose(answer(faster), expected, atol=1e-3)
    ordinary = other.base_model.ordinary
    assert all(map(torch.equal, ordinary.parameters(), other.base_model.parameters()))
    assert {id(p) for p in ordinary.parameters()} <= {id(p) for p in other.parameters()}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("dense", AutoModelForSequenceClassification),
        ("moebert", AutoModelForSequenceClassification),
        ("tied spans", AutoModelForQuestionAnswering),
        ("bare", AutoModel),
        ("bare moebert", AutoModel),
    ],
)
def test_saved_and_loaded_it_is_the_ordinary_model(name, auto, tmp_path):
    model = MODELS[name]()
    accelerate(model).save_pretrained(tmp_path / "fast")
    model.save_pretrained(tmp_path / "plain")
    for file in ("config.json", "model.safetensors"):
        one, other = ((tmp_path / how / file).read_bytes() for how in ("fast", "plain"))
        assert one == other
    back = auto.from_pretrained(tmp_path / "fast", dtype=torch.float64).eval()
    assert type(back) is type(model)
    assert torch.equal(answer(back), answer(model))


def test_twice_is_as_good_as_once(make):
    model = make()
    once = accelerate(model)
    twice = accelerate(once)
    assert torch.equal(answer(twice), answer(once))
    assert twice.base_model.ordinary is once.base_model.ordinary is model.base_model


def test_the_model_it_was_made_from_stays_as_it_is(make):
    model = make()
    model.train()
    model.base_model.encoder.layer[0].eval()  # frozen by hand
    modes = [module.training for module in model.modules()]
    before, names = answer(model), [name for name, _ in model.named_modules()]
    faster = accelerate(model)
    assert modes == [module.training for module in model.modules()]
    answer(faster)
    faster.register_forward_hook(lambda *_: pytest.fail("the other model ran"))
    assert torch.equal(answer(model), before)
    assert type(model.base_model).forward is not type(faster.base_model).forward
    assert names == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("trained", ["ordinary", "accelerated"])
def test_training_one_changes_the_other(make, trained):
    model = make()
    faster, before = accelerate(model), answer(model)
    answer(faster)
    mine = model if trained == "ordinary" else faster
    optimiser = torch.optim.AdamW(mine.parameters(), lr=1e-2)
    mine(**INPUTS)[0].square().sum().backward()
    optimiser.step()
    assert not torch.allclose(answer(model), before, atol=1e-3)
    assert torch.allclose(answer(model), answer(faster), rtol=0, atol=1e-10)


def test_embeddings_can_be_resized():
    faster = accelerate(dense())
    faster.resize_token_embeddings(105, mean_resizing=False)
    inputs = {**INPUTS, "input_ids": INPUTS["input_ids"] + 5}
    assert answer(faster, within=inputs).shape == (4, 2) and faster.config.vocab_size == 105


@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_a_pipeline_gives_the_same_answers(task, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model = moebert().float()
    model = model if task == "text-classification" else model.bert
    texts = ["good film", "bad", "a bad good film"]
    one, other = (
        pipeline(task, model=m, tokenizer=tokenizer)(texts) for m in (model, accelerate(model))
    )
    if task == "feature-extraction":
        for x, y in zip(one, other, strict=True):
            assert torch.allclose(torch.tensor(x), torch.tensor(y), rtol=0, atol=1e-5)
        return
    assert [a["label"] for a in one] == [a["label"] for a in other]
    assert [a["score"] for a in one] == pytest.approx([a["score"] for a in other], abs=1e-5)


@pytest.mark.parametrize("routing", [None, "hash-random", "gate-token"])
def test_transformers_trainer_takes_the_same_steps(routing, tmp_path):
    plain = (moebert(routing=routing) if routing else dense()).float()
    faster = accelerate(copy.deepcopy(plain))
    start = [p.detach().clone() for p in plain.parameters()]
    rows = [
        dict(input_ids=ids, attention_mask=mask, labels=i % 2)
        for i, (ids, mask) in enumerate(
            zip(*batch([7, 12, 3, 7, 5, 9, 2, 4]).values(), strict=True)
        )
    ]
    losses = []
    for model in (plain, faster):
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
            optim="sgd",
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(plain.parameters(), faster.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(start, faster.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BertLMHeadModel(tiny(is_decoder=True)), "not a decoder"),
        (
            lambda: DebertaV2Model(DebertaV2Config(**SMALL, intermediate_size=8, vocab_size=9)),
            "BERT, MiniLM, RoBERTa, ELECTRA, MPNet, DistilBERT, .* not a DebertaV2Model",
        ),
        (lambda: torch.nn.Linear(2, 2), "not a Linear"),
        (lambda: moebert(padding_in_balance=True), "padding_in_balance=False"),
    ],
)
def test_what_cannot_be_done_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        accelerate(make())


def tiny(**config):
    return BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **config)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("part", ["", ".attention", ".attention.self", ".output", ".intermediate"])
def test_a_users_hook_is_called_whatever_it_listens_to(part, grad):
    model, seen = dense().float(), []
    model(**INPUTS, output_hidden_states=True)  # transformers' own hooks stay behind
    faster = accelerate(model)
    listened = model.get_submodule(f"bert.encoder.layer.1{part}")
    with torch.set_grad_enabled(grad):
        before = faster(**INPUTS).logits
        hook = listened.register_forward_hook(lambda *args: seen.append(1))
        after = faster(**INPUTS).logits
        hook.remove()
        faster(**INPUTS)
    assert seen == [1] and torch.allclose(before, after, atol=1e-5)


class Mean(BertForSequenceClassification):
    """A classifier that reads all tokens."""

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None].to(states.dtype)
        return self.classifier((states * real).sum(1) / real.sum(1))


def test_a_head_of_ones_own_gets_all_states():
    model = dense(Mean)
    with torch.no_grad():
        inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
        assert torch.allclose(accelerate(model)(**inputs), model(**inputs), rtol=0, atol=1e-12)


def test_a_mask_of_another_shape_is_no_business_of_packing():
    model, ids = dense(), INPUTS["input_ids"]
    for mask in (torch.ones(1, ids.shape[1]), torch.ones(len(ids), ids.shape[1] + 2)):

        def answer(one, mask=mask):
            try:
                with torch.no_grad():
                    return one(input_ids=ids, attention_mask=mask).logits
            except Exception as error:
                return type(error)

        found, expected = answer(accelerate(model)), answer(model)
        assert found is expected or torch.allclose(found, expected, rtol=0, atol=1e-12)


def other_layer(model):
    layer = model.bert.encoder.layer[1]
    layer.output = type("Own", (type(layer.output),), {"__module__": "elsewhere"})(model.config)


def other_forward(model):
    layer = model.bert.encoder.layer[1]
    layer.forward = layer.forward


@pytest.mark.parametrize("change", [other_layer, other_forward])
def test_layers_with_a_forward_of_their_own_are_refused(change):
    model = dense()
    change(model)
    with pytest.raises(ValueError, match=r"encoder.layer.1(.output)? is a \w+ with a forward"):
        accelerate(model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_what_is_no_floating_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="expected a floating dtype such as torch.bfloat16"):
        accelerate(dense(), dtype=dtype)
