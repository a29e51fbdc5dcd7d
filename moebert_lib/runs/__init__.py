"""Run notebooks: plan, execute, sweep, status and tables of all runs."""
