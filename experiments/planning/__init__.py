"""Parts of `experiments.plan`: targets, cases, their compilation, advice and reports."""
