"""Every knob of an experiment, typed, validated, and with the source of its value.

A notebook's ``parameters`` cell holds literals; the next cell turns them into one
frozen :class:`Settings`. Unknown names and ill-typed values are refused here, before
any compute, with the nearest valid choice in the message.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moebert_lib.config.errors import UserError, nearest
from moebert_lib.config.presets import FFN_WIDTHS, MINILM, RELEASE, SCALES, defaults

Scale = Literal["smoke", "quick", "small", "base", "paper"]
PaperRouting = Literal["hash-random", "hash-balance", "gate-token", "gate-sentence"]
Routing = Literal[PaperRouting, "hash-cluster"]
Ranking = Literal["importance", "random", "inverse"]
Grouping = Literal["deal", "kmeans-weights", "kmeans-activations", "coactivation"]
Distil = Literal["all", "skip", "last", "none"]

#: Settings that need a gate, with the value that a hash has.
GATES_ONLY: dict[str, Any] = {
    "gate_top_k": 1,
    "gate_noise": 0.0,
    "gate_capacity": None,
    "gate_assignment": "argmax",
    "gate_start": "random",
}

MOST = 2**31 - 1  # of a seed; numpy's and torch's generators take this much and some runs more


class Settings(BaseModel):
    """One experiment. Frozen; :meth:`at` fills in what the scale decides.

    Sizes are in neurons, lengths in tokens, ``None`` means "no limit" for a count and
    "the paper's proportion" for ``expert_size`` and ``n_shared``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What is run
    scale: Scale = "quick"
    task: str = "library"
    seed: int = Field(0, ge=0, le=MOST)  # routing tables, sampling, dropout, order of examples
    teacher_seed: int | None = Field(None, ge=0, le=MOST)  # None: the same as seed
    data_dir: str = ""  # GLUE-format files; empty: built-in data, or the hub

    # Model and data
    model: str = MINILM
    max_length: int = Field(64, ge=8, le=512)  # tokens; the paper: Table 7
    doc_stride: int = Field(128, ge=1)  # tokens that windows of a long context share; SQuAD
    max_train_examples: int | None = Field(None, ge=8)
    max_eval_examples: int | None = Field(None, ge=8)
    subsample: Literal["hash", "position"] = "hash"  # what a limit draws examples by
    second_test: int = Field(0, ge=0)  # training examples held out as a further test set
    held_out: float = Field(0.0, ge=0, le=0.5)  # share of training examples to choose settings by
    evaluate_on: Literal["validation", "held-out"] = "validation"  # what models are judged on

    # Teacher: fine-tuned on the task first; its hyper-parameters are not in the paper
    teacher_epochs: float = Field(3.0, ge=0)  # 0: the model is fine-tuned on the task already
    teacher_learning_rate: float = Field(5e-5, gt=0)
    teacher_batch_size: int = Field(32, ge=1)
    teacher_weight_decay: float = Field(0.0, ge=0)
    teacher_warmup: float = Field(0.0, ge=0, lt=1)  # share of the updates; the rate rises linearly

    # Importance (Eq. 4)
    importance_examples: int | None = Field(None, ge=8)  # None: the whole split
    importance_split: Literal["train", "validation", "held-out"] = "train"  # release: validation

    # What the teacher becomes; half-depth: its every other layer, a control of the same cost
    student: Literal["experts", "half-depth"] = "experts"

    # Experts (Sec. 3.1): N = 4, 768 neurons each, 512 of them shared, of 3072
    n_experts: int = Field(4, ge=1)
    expert_size: int | None = Field(None, ge=1)  # None: FFN width // n_experts
    n_shared: int | None = Field(None, ge=0)  # None: two thirds of expert_size
    ranking: Ranking = "importance"  # Fig. 3a
    grouping: Grouping = "deal"  # of what is not shared; others than a deal: MoEfication
    split_seed: int = Field(0, ge=0, le=MOST)  # of ranking="random", and of k-means' start
    routing: Routing = "hash-random"  # Fig. 3c; hash-cluster is beyond the paper
    gate_top_k: int = Field(1, ge=1)  # experts a token behind a gate; the paper: 1

    # Remedies against a gate that sends everything to one expert; none is in the paper
    balance_weight: float = Field(0.01, ge=0)  # of the load-balance loss; the release's
    balance_over: Literal["tokens", "sentences"] = "tokens"  # a mean; release: sentences
    gate_noise: float = Field(0.0, ge=0)  # standard deviation on the logits while training
    gate_capacity: float | None = Field(None, ge=1)  # tokens an expert takes over the mean load
    gate_assignment: Literal["argmax", "balanced"] = "argmax"  # balanced: BASE layers, in training
    gate_start: Literal["random", "experts", "nearest"] = "random"  # rows of W_g before training

    # Distillation (Eq. 5-7) and training (Table 7)
    distill: Distil = "all"  # Fig. 3b; "none": Table 3
    distill_weight: float = Field(1.0, ge=0)  # lambda_distill
    hidden_loss_mean: Literal["tokens", "examples"] = "tokens"  # of Eq. 5; the release: tokens
    epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(5e-5, gt=0)
    batch_size: int = Field(16, ge=1)
    eval_batch_size: int = Field(64, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.0, ge=0, lt=1)  # share of the updates; appendix: no warm-up
    schedule: Literal["linear", "constant"] = "linear"  # of the rate after warm-up
    score_at: tuple[Annotated[float, Field(gt=0)], ...] = ()  # epochs after which to score, too
    max_grad_norm: float = Field(1.0, gt=0)  # appendix: clipping 1.0
    dropout: float = Field(0.1, ge=0, lt=1)  # BERT's own, student and teacher training
    student_dropout: float | None = Field(None, ge=0, lt=1)  # None: as dropout

    # How training is computed
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU only
    tokens_per_batch: int | None = Field(None, ge=8)  # of a student; None: batch_size sentences
    cache_teacher: bool = False  # ask the teacher once for all epochs and students of a notebook

    # Answers that are spans (SQuAD): not in the paper, transformers' usual values
    n_best: int = Field(20, ge=1)  # start and end candidates of each window
    max_answer_length: int = Field(30, ge=1)  # tokens
    null_threshold: float = 0.0  # v2.0: no answer where its score exceeds the best span's by this

    # Where paper and release differ; the default is the paper, or the sound choice
    preset: Literal["paper", "release"] = "paper"  # release: all of them as released
    teacher_dropout: bool = False  # release: on while distilling
    shared_neurons: Literal["copied", "tied"] = "copied"  # tied: one for all experts
    expert_layer_norm: Literal["per-expert", "shared"] = "per-expert"
    gate_scaling: Literal["inside", "outside"] = "inside"  # release: outside the residual
    padding_in_loss: bool = False  # release: padding counts in the hidden and the balance loss

    # How much evidence the notebooks gather
    n_random_splits: int = Field(5, ge=2)
    n_seeds: int = Field(3, ge=1)

    @classmethod
    def at(cls, scale: str = "quick", **changes: Any) -> Self:
        """Settings of a scale with changes on top; errors are one readable line.

        Raises:
            UserError: unknown scale or name, ill-typed or out-of-range value, or expert
                sizes that do not fit the model's FFN.
        """
        if not isinstance(scale, str) or scale not in SCALES:
            raise UserError(f"unknown scale '{scale}'; {nearest(scale, SCALES)}")
        for name in changes:
            if name not in cls.model_fields:
                raise UserError(f"unknown setting '{name}'; {nearest(name, cls.model_fields)}")
        task = changes.get("task") or SCALES[scale]["task"]
        values = defaults(scale, task, changes.get("model") or SCALES[scale].get("model", MINILM))
        if changes.get("preset") == "release":
            values |= RELEASE
        try:
            return cls(**{**values, **changes, "scale": scale, "task": task})
        except ValidationError as error:
            raise UserError(_one_line(error)) from None

    def but(self, **changes: Any) -> Self:
        """The same experiment with some settings changed, validated again.

        A changed ``preset`` changes its switches with it, and a hash has nothing of a gate.
        """
        values = self.model_dump()
        if "preset" in changes:
            usual = type(self).at(self.scale, task=self.task, model=self.model)
            of_scale = {name: getattr(usual, name) for name in RELEASE}
            values |= RELEASE if changes["preset"] == "release" else of_scale
        if str(changes.get("routing", "")).startswith("hash-"):
            values |= GATES_ONLY
        for name in changes:
            if name not in values:
                raise UserError(f"unknown setting '{name}'; {nearest(name, values)}")
        try:
            return type(self)(**{**values, **changes})
        except ValidationError as error:
            raise UserError(_one_line(error)) from None

    def on(self, task: str, **changes: Any) -> Self:
        """The same experiment on another task, whose own defaults apply (Table 7 at ``paper``).

        What was chosen here beyond the scale's values for this task and model stays chosen.
        """
        usual = type(self).at(self.scale, task=self.task, model=self.model).model_dump()
        chosen = {name: value for name, value in self if value != usual[name]}
        return type(self).at(self.scale, **{"model": self.model, **chosen, **changes, "task": task})

    @property
    def dense_seed(self) -> int:
        """Seed of the teacher: its own where it has one, else the experiment's."""
        return self.seed if self.teacher_seed is None else self.teacher_seed

    @property
    def offline(self) -> bool:
        """Whether the scale uses no network."""
        return self.scale in ("smoke", "quick", "base")

    @property
    def brief(self) -> bool:
        """Whether the scale leaves out what takes long; its built-in tasks take minutes."""
        return self.scale in ("smoke", "quick")

    def sizes(self, width: int) -> tuple[int, int]:
        """``(expert_size, n_shared)`` in neurons for an FFN of ``width`` neurons.

        The defaults are the paper's proportions: the FFN's width split evenly (768 = 3072 / 4)
        and two thirds of an expert shared (512 of 768).
        """
        return proportions(width, self.n_experts, self.expert_size, self.n_shared)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are values of a switch only")
        return value

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        chosen = isinstance(values, dict) and values.get("preset") == "release"
        return {**RELEASE, **values} if chosen else values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.tokens_per_batch or self.max_length) < self.max_length:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} cannot hold a sentence; "
                f"expected max_length={self.max_length} or more"
            )
        if self.cache_teacher and (self.teacher_dropout or self.padding_in_loss):
            raise ValueError(
                "cache_teacher=True needs the same states every time; expected "
                "teacher_dropout=False and padding_in_loss=False"
            )
        if not self.held_out and "held-out" in (self.importance_split, self.evaluate_on):
            name = "evaluate_on" if self.evaluate_on == "held-out" else "importance_split"
            raise ValueError(
                f"{name}='held-out' needs examples that are held out; expected held_out above 0, "
                "such as held_out=0.1"
            )
        if max(self.score_at, default=0) > self.epochs:
            raise ValueError(
                f"score_at={list(self.score_at)} goes beyond the training; "
                f"expected at most epochs={self.epochs:g}"
            )
        check_top_k("gate_top_k", self.gate_top_k, self)
        check_remedies(self, top_k=self.gate_top_k)
        width = FFN_WIDTHS.get(self.model)
        if width is not None:  # else checked when the run is planned, or by deal_neurons
            self.fit(width)
        return self

    def fit(self, width: int) -> None:
        """Refuse expert sizes that an FFN of ``width`` neurons cannot fill.

        Raises:
            ValueError: naming the largest size that fits.
        """
        sizes = (self.n_experts, self.expert_size, self.n_shared)
        check_sizes(width, *sizes, whose=self.model)
        check_gate_start(self.gate_start, *self.sizes(width))


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return message
    if first["type"] == "literal_error":
        choices = Settings.model_fields[where].annotation.__args__
        return f"{where}={first['input']!r}: {nearest(str(first['input']), choices)}"
    return f"{where}={first['input']!r}: {message[0].lower()}{message[1:]}"


# How many neurons an expert has, in the paper's proportions, and what a layer can fill.


def proportions(
    width: int, n_experts: int, expert_size: int | None = None, n_shared: int | None = None
) -> tuple[int, int]:
    """``(expert_size, n_shared)`` in neurons, the paper's proportions where None.

    Example:
        >>> proportions(3072, 4)
        (768, 512)
    """
    expert_size = max(width // n_experts, 1) if expert_size is None else expert_size
    return expert_size, 2 * expert_size // 3 if n_shared is None else n_shared


def check_sizes(
    width: int,
    n_experts: int,
    expert_size: int | None = None,
    n_shared: int | None = None,
    *,
    whose: str = "the model",
) -> None:
    """Refuse experts that a layer of ``width`` neurons cannot fill; None as in the paper.

    Raises:
        ValueError: naming the largest size that fits by the same rule.
    """
    size, shared = proportions(width, n_experts, expert_size, n_shared)
    if shared > size:
        raise ValueError(
            f"n_shared={shared} exceeds expert_size={size}; "
            f"the largest n_shared is {min(size, width)}"
        )
    needed = shared + n_experts * (size - shared)
    if needed <= width:
        return

    def fits(n: int, k: int) -> bool:
        s = proportions(width, n, k, n_shared)[1]
        return s <= k and s + n * (k - s) <= width

    largest = next((k for k in range(width, 0, -1) if fits(n_experts, k)), 0)
    hint = f"the largest expert_size that fits is {largest}"
    if not largest:
        fewer = next((n for n in range(width, 0, -1) if fits(n, expert_size or 1)), 0)
        hint = (
            f"the largest n_experts that fits is {fewer}"
            if fewer
            else f"an expert holds at most {width}"
        )
    raise ValueError(
        f"{n_experts} experts of {size} neurons with {shared} shared need {needed} neurons, "
        f"{whose} has {width}; {hint}"
    )


def check_top_k(name: str, k: int, of: Any) -> None:
    """Refuse ``k`` experts a token that a router cannot name, or that nobody has defined.

    Args:
        name: Of the setting that says ``k``.
        k: Experts that serve each token.
        of: What has ``routing``, ``n_experts`` and ``gate_scaling``.

    Raises:
        ValueError: in one line.
    """
    if k == 1:
        return
    if not 1 <= k <= of.n_experts:
        raise ValueError(f"{name}={k}: expected 1 to n_experts={of.n_experts}")
    if not of.routing.startswith("gate-"):
        raise ValueError(
            f"{name}={k} needs a gate, and routing='{of.routing}' names one expert a "
            f"token; expected {name}=1, gate-token or gate-sentence"
        )
    if of.gate_scaling == "outside":
        raise ValueError(
            f"{name}={k}: gate_scaling='outside' scales one expert's state; "
            f"expected {name}=1 or gate_scaling='inside'"
        )


def check_gate_start(gate_start: str, expert_size: int, n_shared: int) -> None:
    """Refuse a gate that starts from its experts' own neurons where they have none.

    Raises:
        ValueError: in one line.
    """
    if gate_start == "experts" and n_shared == expert_size:
        raise ValueError(
            "gate_start='experts' needs neurons that only one expert has; expected n_shared "
            f"below expert_size={expert_size}"
        )


def check_remedies(of: Any, *, top_k: int) -> None:
    """Refuse remedies against collapse that a router does not have, or that exclude each other.

    Args:
        of: What has ``routing`` and the settings of gates by name, those of training at least.
        top_k: Experts that serve each token.

    Raises:
        ValueError: in one line.
    """
    for name, usual in GATES_ONLY.items():
        value = getattr(of, name, usual)
        if value != usual and not of.routing.startswith("gate-"):
            raise ValueError(
                f"{name}={value} needs a gate, and routing='{of.routing}' has none; "
                f"expected {name}={usual}, gate-token or gate-sentence"
            )
    limits = of.gate_capacity is not None, of.gate_assignment == "balanced"
    if all(limits):
        raise ValueError(
            "gate_assignment='balanced' gives all experts the same load, which gate_capacity="
            f"{of.gate_capacity} cannot limit; expected one of the two"
        )
    if any(limits) and top_k > 1:
        name = "gate_capacity" if limits[0] else "gate_assignment"
        raise ValueError(
            f"{name}={getattr(of, name)} gives a token one expert, and {top_k} are asked for; "
            f"expected {name}={GATES_ONLY[name]} or one expert a token"
        )
    if top_k > 1 and getattr(of, "gate_start", "random") == "nearest":
        raise ValueError(
            f"gate_start='nearest' is fitted to one expert a token, and {top_k} are asked for; "
            "expected gate_start=random or experts, or one expert a token"
        )
    if of.gate_noise < 0 or (limits[0] and of.gate_capacity < 1):
        raise ValueError(
            f"gate_noise={of.gate_noise}, gate_capacity={of.gate_capacity}: expected a deviation "
            "of 0 or more, and room for all tokens: 1 or more"
        )
