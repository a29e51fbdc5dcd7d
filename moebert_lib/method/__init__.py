"""The paper's method: importance, partition, routing and distillation.

Functions of tensors, in the paper's letters, that know no experiment and no file of a run. Each
formula of the paper is one function: ``importance.example_importance`` (Eq. 4),
``partition.deal_neurons`` (Fig. 1), ``routing.experts_forward`` (Eqs. 1-2),
``routing.random_table`` and ``balanced_table`` (hashes), ``routing.gate_route`` (Eq. 3), and
``distillation_loss`` (Eqs. 5-7).
"""

from moebert_lib import lazy_files

__getattr__, __dir__ = lazy_files(__name__, __file__)
