"""How many neurons an expert has, in the paper's proportions, and what a layer can fill."""

from typing import Any


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
