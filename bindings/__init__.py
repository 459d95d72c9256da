"""Layer 5: pccl for other frameworks. Import as `pccl.bindings`."""

if not __name__.startswith("pccl."):
    raise ImportError("import pccl.bindings; under its bare name this folder would be a second copy of the same classes")
