"""Layer 3: schedules, the planner, reduction kernels and the executor. Import as `pccl.collectives`."""

if not __name__.startswith("pccl."):
    raise ImportError("import pccl.collectives; under its bare name this folder would be a second copy of the same classes")
