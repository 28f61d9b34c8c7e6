"""Parts of `experiments.plan`: targets, cases, the program that compiles one case, the queue,
advice and reports."""
