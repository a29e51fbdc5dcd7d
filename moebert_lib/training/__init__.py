"""Train teachers and students, resume a training, evaluate models and look at their routing."""
