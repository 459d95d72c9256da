"""`pccl bench`: what calls cost on this machine, and what losses, newcomers, commits and memory cost.

`command` has the command line, `calls`, `churn` and `cost` the benchmarks, `crew` the processes as they see them, `worker` what runs in
those, `report` and `plot` what is printed, written and drawn.
"""
