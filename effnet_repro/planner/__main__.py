"""`python -m effnet_repro.planner` fits the model again and writes results/."""

from effnet_repro.planner.fitting import write_results

write_results()
