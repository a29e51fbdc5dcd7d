"""Interactive exploration: the explorer of importance, its page, and the notebooks' widgets."""
