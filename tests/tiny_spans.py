"""The tiny BERT and the tiny batch of ``conftest`` with spans for answers."""

import torch
from transformers import BertForQuestionAnswering


def span_bert(dense):
    """A ``BertForQuestionAnswering`` around the encoder of a tiny BERT."""
    model = BertForQuestionAnswering(dense.config)
    model.bert.load_state_dict(dense.bert.state_dict(), strict=False)  # it has no pooler
    noise = torch.Generator().manual_seed(7)
    for values in model.qa_outputs.parameters():
        values.data = 0.2 * torch.randn(values.shape, generator=noise)
    return model.to(dense.dtype).eval()


def span_batch(batch, *, seed=0):
    """The batch with a span among each row's real tokens instead of its label."""
    noise = torch.Generator().manual_seed(seed)
    lengths = batch["attention_mask"].sum(1)
    drawn = (torch.rand(len(lengths), 2, generator=noise) * lengths[:, None]).long()
    start, end = drawn.sort(1).values.unbind(1)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**inputs, "start_positions": start, "end_positions": end}
