"""Tasks and their examples: where they come from, how they become batches, SQuAD's answers."""
