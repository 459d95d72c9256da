"""`pccl bench`: what calls cost on this machine, and what losses, newcomers, commits and memory cost.

`command` and `options` have the command line; `calls`, `churn` and `cost` the benchmarks; `crew` the processes as they see them, `teams`
those that are compared, `mpi` where an MPI is; `worker` what runs in them, `systems` the libraries there, `buffers` their data; `report`
and `plot` what is printed, written and drawn.
"""
