"""Several processes, started by torchrun or ``accelerate launch``, that run one command."""
