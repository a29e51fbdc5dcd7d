"""Tiny models to share: a BERT in a folder with its tokenizer, and its conversion."""

import torch
from tiny_spans import span_batch, span_bert
from transformers import BertTokenizerFast

from moebert_lib.method.importance import ffn_importance
from moebert_lib.model.conversion import load_dense
from moebert_lib.publish import share_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "short", ".", "the"]


def saved_bert(tmp_path, tiny_bert, *, spans=False):
    """A folder ``bert`` with a fine-tuned model's files."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    dense = tiny_bert(dtype=torch.float32)
    (span_bert(dense) if spans else dense).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def converted(folder, tiny_batch, **sizes):
    """The saved BERT converted by its own scores."""
    dense, batch = load_dense(str(folder)), tiny_batch()
    scores = ffn_importance(dense, [span_batch(batch) if hasattr(dense, "qa_outputs") else batch])
    return share_model.from_scores(str(folder), scores, **{"n_experts": 4, "seed": 0, **sizes})
