"""Layer 5: the command line. Import as `pccl.tools`."""

if not __name__.startswith("pccl."):
    raise ImportError("import pccl.tools; under its bare name this folder would be a second copy of the same classes")
