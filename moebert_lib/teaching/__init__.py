"""What the notebooks teach with: checks of equalities that a reader runs, and exercises."""
